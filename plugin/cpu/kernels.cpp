// Picks the kernels for this processor.
#include "kernel.h"

namespace mlff {

#if defined(MLFF_X86_64)
namespace v2 { KernelTable kernels(); }
namespace v3 { KernelTable kernels(); }
namespace v4 { KernelTable kernels(); }

KernelTable cpu_kernels() {
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  return avx512 && avx2 ? v4::kernels() : avx2 ? v3::kernels() : v2::kernels();
}
#else
namespace base { KernelTable kernels(); }

KernelTable cpu_kernels() { return base::kernels(); }
#endif

}  // namespace mlff
