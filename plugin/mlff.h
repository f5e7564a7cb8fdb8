/* mlff: run a distilled force field from one model file. The whole contract between the core and its users.
 *
 * Units: Angstrom, eV. All arrays are C-contiguous, row-major, owned by the caller and only borrowed during the call.
 * Signs: an edge vector is r_ij = x_j + shift - x_i for the destination (centre) i and the source (neighbour) j;
 *        forces are -dE/dx; the virial is W_ab = -sum_edges r_a dE/dr_b, symmetrised, so that the pressure is
 *        (N k T + tr W / 3) / V and the stress by ASE's convention is -W / V.
 * Virials have six components in LAMMPS's order: xx, yy, zz, xy, xz, yz.
 *
 * Errors: functions that can fail return MLFF_OK (0) or an error code; mlff_last_error() is then one line of text that
 * names what was wrong, what was expected and what to do. It belongs to the calling thread and is valid until the next
 * call of this library from that thread. No function throws, exits or prints. After an error the model and the system
 * stay valid: the call can be repeated with better input.
 *
 * Threads: a model is immutable and can be shared by any number of threads. A system belongs to one thread at a time.
 */
#ifndef MLFF_H
#define MLFF_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define MLFF_API
#else
#define MLFF_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MLFF_ABI_VERSION 3

typedef enum {
  MLFF_OK = 0,
  MLFF_ERROR_FILE = 1,     /* missing, truncated, damaged, foreign or too new a file */
  MLFF_ERROR_INPUT = 2,    /* the caller's arguments: element, shape, NaN, cell ... */
  MLFF_ERROR_RESOURCE = 3, /* out of memory, no such device */
  MLFF_ERROR_EXCHANGE = 4, /* the exchange callback reported a failure, or is needed and was not set */
  MLFF_ERROR_INTERNAL = 5
} mlff_status;

typedef struct mlff_model mlff_model;   /* a loaded file */
typedef struct mlff_system mlff_system; /* one simulation with that model: neighbour list and workspace */

MLFF_API int mlff_abi_version(void);
MLFF_API const char *mlff_version(void);
MLFF_API const char *mlff_last_error(void);

/* Number of devices of a kind that could be used: of "cuda", the GPUs that the NVIDIA driver shows, 0 without a driver; of
 * "cpu", 1. */
MLFF_API int mlff_device_count(const char *kind, int32_t *count);

/* ---- model ------------------------------------------------------------------------------------------------------- */

/* Load a model.pt (or a bare payload) from a file, or from memory (copied). The content hash is verified. */
MLFF_API int mlff_model_load(const char *path, mlff_model **model);
MLFF_API int mlff_model_load_memory(const void *data, size_t size, mlff_model **model);
MLFF_API void mlff_model_free(mlff_model *model);

/* Header of the payload as JSON text (architecture, hyper-parameters, provenance ...; see docs/file-format.md). */
MLFF_API const char *mlff_model_header(const mlff_model *model);
/* SHA-256 of the payload's content as 64 hexadecimal digits: the identity of the model. */
MLFF_API const char *mlff_model_sha256(const mlff_model *model);
MLFF_API double mlff_model_cutoff(const mlff_model *model);
/* Elements that the model knows: the number of them, and their atomic numbers by species index. */
MLFF_API int32_t mlff_model_n_species(const mlff_model *model);
MLFF_API const int32_t *mlff_model_atomic_numbers(const mlff_model *model);
/* Species index of an atomic number, or -1. */
MLFF_API int32_t mlff_model_species_of(const mlff_model *model, int32_t atomic_number);

/* Evaluate the file's reference structures on `device` and compare with the stored values. Either result may be NULL.
 * Returns MLFF_ERROR_INTERNAL, with the deviations in the message, if they exceed 1e-5 eV/atom or 1e-4 eV/Angstrom. */
MLFF_API int mlff_model_self_check(const mlff_model *model, const char *device, double *max_energy_error_per_atom,
                                   double *max_force_error);

/* MLFF_OK if a system of the model can be made on `device`; else the error that mlff_system_create would give: no driver, no
 * such GPU, no machine code for it in the file. */
MLFF_API int mlff_model_supports(const mlff_model *model, const char *device);

/* ---- system ------------------------------------------------------------------------------------------------------ */

/* device: "cpu", "cuda" (the first GPU) or "cuda:N". The model may be freed before the system. On a GPU, systems of one model
 * share its weights, and work is done in the device's primary context, like torch's. The GPU is left as it was found: no context
 * stays current. */
MLFF_API int mlff_system_create(const mlff_model *model, const char *device, mlff_system **system);
MLFF_API void mlff_system_free(mlff_system *system);

/* Number of threads of the CPU backend; 0 means the OpenMP default. Results are bit-for-bit reproducible for a fixed number.
 * No effect on a GPU. */
MLFF_API int mlff_system_set_threads(mlff_system *system, int32_t n_threads);

/* Atoms. n_local atoms are the centres of this call; rows n_local .. n_total-1 are ghosts (periodic images or atoms of other
 * ranks; none for an engine without ghosts, where n_total == n_local).
 * species: [n_total] species index of the model, or -1 for an atom that the model must ignore. Copied. */
MLFF_API int mlff_system_set_atoms(mlff_system *system, int64_t n_local, int64_t n_total, const int32_t *species);

/* Full neighbour list given by the engine, copied and kept until replaced: the neighbours of local atom i are
 * neighbors[offsets[i]] .. neighbors[offsets[i+1]-1], each in 0 .. n_total-1. Both directions of every pair of which at
 * least one atom is local must be there (a pair of a local atom and a ghost: in the local atom's row). Entries beyond the
 * cutoff are allowed and skipped at every evaluation, so a list with a skin can be kept while atoms move.
 * CPU only: on a GPU mlff_system_compute searches by itself, and this is MLFF_ERROR_INPUT. */
MLFF_API int mlff_system_set_neighbors(mlff_system *system, const int64_t *offsets, const int32_t *neighbors);

/* Ghosts that are the same atom as an earlier row (periodic images, mostly) need no features of their own. originals: [n_total],
 * for each row the first row that is the same atom: originals[k] == k for local atoms and for ghosts that are nowhere else on
 * this rank, less for images. Features are read from the originals, so the exchange may leave images as they are, and results
 * that belong to an image are added to its original. Optional, after set_atoms (which forgets it). Copied. */
MLFF_API int mlff_system_set_images(mlff_system *system, const int32_t *originals);

/* Fill the ghost rows of a feature table from their owners. rows is [n_total, width] float; the callback must write rows n_local
 * .. n_total-1 with the owner's row (forward communication). Called by every rank the same number of times in the same order in
 * every evaluation with the same outputs, also by ranks without atoms. Return 0 for success. rows is host memory on every
 * device. Without a callback, a system that has ghosts other than images cannot be evaluated by a model with more than one
 * message layer. */
typedef int (*mlff_exchange_fn)(void *user, float *rows, int32_t width);
MLFF_API int mlff_system_set_exchange(mlff_system *system, mlff_exchange_fn exchange, void *user);
/* Largest width (a multiple of 2), on any device, that the callback will be called with. */
MLFF_API int32_t mlff_model_max_exchange_width(const mlff_model *model);

/* ---- evaluation -------------------------------------------------------------------------------------------------- */

/* Several structures in one system without ghosts: molecules to screen, a batch. Structure b has the atoms starts[b] ..
 * starts[b+1]-1; starts: [n_structures + 1], from 0 to n_total, never decreasing. After set_atoms, which makes all atoms one
 * structure. Copied. */
MLFF_API int mlff_system_set_structures(mlff_system *system, int32_t n_structures, const int64_t *starts);

/* Whether the file holds what extrapolation grades are computed with (mlff_results): 1 or 0. */
MLFF_API int32_t mlff_model_has_extrapolation_grade(const mlff_model *model);

/* Results wanted; NULL pointers are not computed. With forces, virial and atom_virial all NULL only the energy is evaluated.
 * Every array is overwritten, not added to. */
typedef struct {
  double *energy;      /* [1] eV, local atoms */
  double *atom_energy; /* [n_local] eV */
  double *forces;      /* [n_total, 3] eV/Angstrom. Ghost rows hold what belongs to their owners: the engine sums them home */
  double *virial;      /* [6] eV, of the edges of this call's centres; the sum over ranks is the system's */
  double *atom_virial; /* [n_total, 6] eV; half of each edge's term to each of its two atoms (ghost rows: as for forces) */
  double *extrapolation_grade; /* [n_local] no unit, above 1 the model extrapolates (python/mlff/extrapolation.py); 0 for atoms that
                                  the model ignores. MLFF_ERROR_INPUT for a file without */
} mlff_results;

/* Evaluate a system whose periodicity is in its ghosts. positions: [n_total, 3]. On the CPU with the neighbour list given by
 * mlff_system_set_neighbors; a GPU finds all pairs of the given atoms by itself. */
MLFF_API int mlff_system_compute(mlff_system *system, const double *positions, const mlff_results *results);

/* Evaluate an engine-free system (n_total == n_local) whose neighbours the core finds itself.
 * cell: [3, 3] rows are the cell vectors in Angstrom, or NULL for none; pbc: [3] periodic directions, or NULL for none.
 * Any triclinic cell, also one smaller than the cutoff; positions may lie outside the cell. */
MLFF_API int mlff_system_compute_periodic(mlff_system *system, const double *positions, const double *cell, const int32_t *pbc,
                                          const mlff_results *results);

/* Evaluate all structures of mlff_system_set_structures, each as mlff_system_compute_periodic would: energy is [n_structures],
 * virial [n_structures, 6], the others as ever. cells: [n_structures, 3, 3] or NULL for none; pbcs: [n_structures, 3] or NULL
 * for none. A GPU evaluates them at once, by a search over all pairs: a structure with more than 65536 candidates (atoms times
 * images) is MLFF_ERROR_INPUT there. mlff_system_edges is not available afterwards. */
MLFF_API int mlff_system_compute_batch(mlff_system *system, const double *positions, const double *cells, const int32_t *pbcs,
                                       const mlff_results *results);

/* Evaluate atoms that are in the memory of the system's GPU, in the caller's units and stream. */
typedef struct {
  void *stream;            /* CUstream (cudaStream_t) of the device's primary context; NULL: the default stream */
  int32_t is_double;       /* whether positions, box and forces are float64; else float32 */
  int64_t n_rows;          /* of positions and forces */
  const void *positions;   /* device [n_rows, 3] */
  const int64_t *atoms;    /* host [n_local]: rows that are the atoms of mlff_system_set_atoms, each once; NULL: all */
  const void *box;         /* device [3, 3], rows are the cell vectors, zeros for a direction that is not periodic; NULL: open */
  double length_unit;      /* Angstrom per unit of length */
  double energy_unit;      /* units of energy per eV */
  double *energy;          /* device [1], or NULL */
  void *forces;            /* device [n_rows, 3] in units of energy per length, or NULL; rows of other atoms are left alone */
} mlff_device_arrays;

/* Returns when the results are there. In a stream that is capturing, kernels are captured and nothing is waited for: the system
 * must have been evaluated before with the same atoms, units and kinds of results. Replayed, such a graph uses memory of the
 * system, which must live on and not be evaluated at the same time; where the atoms do not fit into the memory of that
 * evaluation, where two are at one place or one is not finite, all results are NaN. For one structure without ghosts.
 * MLFF_ERROR_INPUT on the CPU. */
MLFF_API int mlff_system_compute_device(mlff_system *system, const mlff_device_arrays *arrays);

/* Directed pairs within the cutoff of the last evaluation, sorted by centre: count; then centre and neighbour [n], and edge
 * vectors [n, 3] in Angstrom. Any pointer may be NULL. Valid arrays hold at least the count of the first call. MLFF_ERROR_INPUT
 * if the last evaluation failed, was of several structures, or there was none since set_atoms or set_neighbors. On a GPU vectors
 * have float32 accuracy. */
MLFF_API int mlff_system_edges(const mlff_system *system, int64_t *n_edges, int32_t *centers, int32_t *neighbors,
                               double *vectors);

/* Bytes of workspace held by the system, on its device and for copies to it. */
MLFF_API size_t mlff_system_bytes(const mlff_system *system);

#ifdef __cplusplus
}
#endif
#endif
