// The kernel table of one instruction set. Compiled once per instruction set with MLFF_ISA naming it.
#define EIGEN_DONT_PARALLELIZE  // the loops over blocks of atoms are parallel
#include "extrapolation.h"
#include "filter.h"
#include "message.h"
#include "readout.h"
#include "repulsion.h"
#include "update.h"

namespace mlff::MLFF_ISA {

#define MLFF_RADIAL "distance:f64[edges,1] cutoff:f64[1] "
#define MLFF_BASIS "basis:f32[edges,K] slope:f32[edges,K]"
#define MLFF_LIST "offsets:i64[local+1,1] neighbors:i32[edges,1] "
#define MLFF_SOURCE "w1:f32[F,F] b1:f32[F] w2:f32[F,3F] "
#define MLFF_UPDATE_KEPT "pq:f32[local,6F] norm:f32[local,F] hidden:f32[local,F] a:f32[local,3F] "
#define MLFF_READOUT "s:f32[local,F] species:i32[total,1] w1:f32[F,M] b1:f32[M] w2:f32[M] "

KernelTable kernels() {
  static const Kernel table[] = {
      {"radial_basis", MLFF_RADIAL "> " MLFF_BASIS, radial_basis<envelope>},
      {"radial_basis_cosine", MLFF_RADIAL "> " MLFF_BASIS, radial_basis<cosine_cutoff>},
      {"radial_basis_gaussian", MLFF_RADIAL "gaussians:f64[K,2] > " MLFF_BASIS, radial_basis_gaussian<envelope>},
      {"radial_basis_gaussian_cosine", MLFF_RADIAL "gaussians:f64[K,2] > " MLFF_BASIS, radial_basis_gaussian<cosine_cutoff>},
      {"switch_basis", "species:i32[total,1] " MLFF_LIST "distance:f64[edges,1] pair_table:f64[P,3] > " MLFF_BASIS, switch_basis},
      {"message_first",
       "embedding:f32[S,F] q_s:f32[SK,F] q_v:f32[SK,F] species:i32[total,1] " MLFF_LIST
       "unit:f32[edges,3] basis:f32[edges,K] > s:f32[local,F] v:f32[local,3F]",
       message_first},
      {"update",
       "s:f32[local,F] v:f32[local,3F] vu:f32[F,2F] w1:f32[2F,F] b1:f32[F] w2:f32[F,3F] b2:f32[3F] norm_epsilon:f32[1] > "
       "s_out:f32[local,F] v_out:f32[local,3F] " MLFF_UPDATE_KEPT,
       update},
      {"source_features", "s:f32[local,F] v:f32[local,3F] " MLFF_SOURCE "b2:f32[3F] > x:f32[total,6F]", source_features},
      {"message",
       "x:f32[total,6F] s:f32[local,F] filter:f32[K,3F] " MLFF_LIST
       "unit:f32[edges,3] basis:f32[edges,K] > s_out:f32[local,F] v_out:f32[local,3F]",
       message},
      {"readout", MLFF_READOUT "b2:f32[1] shift:f64[S] > atom_energy:f64[local,1]", readout},
      {"extrapolation", "s:f32[local,F] species:i32[total,1] projection:f32[SF,D] environments:f32[SK,D] > grade:f64[local,1]", extrapolation},
      {"repulsion", "species:i32[total,1] " MLFF_LIST "distance:f64[edges,1] pair_table:f64[P,3] > atom_energy:f64[local,1]", repulsion},
      {"readout_backward", MLFF_READOUT "> g:f32[total,4F]", readout_backward},
      {"update_backward", "vu:f32[F,2F] w1:f32[2F,F] w2:f32[F,3F] " MLFF_UPDATE_KEPT "> g:f32[total,4F]", update_backward},
      {"message_backward",
       "g:f32[total,4F] x:f32[total,6F] filter:f32[K,3F] " MLFF_LIST
       "unit:f32[edges,3] distance:f64[edges,1] basis:f32[edges,K] slope:f32[edges,K] > g_x:f32[local,6F] gradient:f64[edges,3]",
       message_backward},
      {"source_features_backward", "g_x:f32[local,6F] s:f32[local,F] " MLFF_SOURCE "> g:f32[total,4F]", source_features_backward},
      {"message_first_backward",
       "g:f32[total,4F] q_s:f32[SK,F] q_v:f32[SK,F] species:i32[total,1] " MLFF_LIST
       "unit:f32[edges,3] distance:f64[edges,1] basis:f32[edges,K] slope:f32[edges,K] > gradient:f64[edges,3]",
       message_first_backward},
      {"repulsion_backward",
       "species:i32[total,1] " MLFF_LIST "distance:f64[edges,1] unit:f32[edges,3] pair_table:f64[P,3] > gradient:f64[edges,3]",
       repulsion_backward},
  };
  return {table, static_cast<int>(sizeof table / sizeof *table)};
}

}  // namespace mlff::MLFF_ISA
