"""How kernels that follow each other overlap on the GPU."""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def previous_kernel(_semantic=None):
    """Waits until the kernel before has written everything, and lets the next one start.

    Kernels for 9.0 are launched while the one before still runs (programmatic dependent launch), and what stands above
    this call overlaps with its end. It may read weights, tables and counts, and what was written two kernels before or earlier; it
    must write nothing. Every program calls this, before it may return. Elsewhere it is nothing.
    """
    if _semantic is not None and _semantic.builder.options.arch == "sm90":
        gdc_wait(_semantic=_semantic)
        gdc_launch_dependents(_semantic=_semantic)


previous_kernel.__triton_builtin__ = True  # the compiler passes _semantic, the interpreter does not


def overlaps(_semantic=None):
    """Whether this is compiled for GPUs whose kernels overlap, which also have room for many weights at once (a constant)."""
    return tl.constexpr(_semantic is not None and _semantic.builder.options.arch == "sm90")


overlaps.__triton_builtin__ = True


def together(*values, _semantic=None):
    """The values, halves that have been loaded, but none of them before all loads are on their way.

    Without it the compiler takes each operand of a product through shared memory, with a barrier, before it loads the next one, and
    their latencies add up. With it all of them are in shared memory at once, for which not every GPU has room.
    """
    if _semantic is None:
        return values
    if _semantic.builder.options.arch != "sm90":
        return tl.tuple(values)
    made = [tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], v.dtype, is_pure=False, pack=2, _semantic=_semantic) for v in values]
    return tl.tuple(made)


together.__triton_builtin__ = True
