/* The numbers by which the kernels are launched, for the CUDA source, the C++ library and the Python runtime.
 *
 * Python reads this file line by line (arcflow_runtime/gpu/kernels.py), so each constant is a #define of one integer.
 *
 * update.cu: a block has UPDATE_THREADS threads, halved down to UPDATE_MIN_THREADS until its shared memory fits in
 * MAX_SHARED_BYTES. A token takes LANES threads and UPDATE_TOKEN_FLOATS floats of shared memory. Each block takes
 * UPDATE_BLOCK_BYTES in addition.
 * euler.cu: a block has EULER_THREADS threads, and a token takes LANES of them.
 * noise.cu: one block of NOISE_THREADS threads and NOISE_SHARED_BYTES per image.
 */
#ifndef ARCFLOW_GEOMETRY_H
#define ARCFLOW_GEOMETRY_H

#define ARCFLOW_MAX_SHARED_BYTES 49152 /* what every GPU gives a block without opting in */

#define ARCFLOW_UPDATE_THREADS 128
#define ARCFLOW_UPDATE_MIN_THREADS 32
#define ARCFLOW_UPDATE_LANES_32_BIT 16 /* for heads or a velocity in float32 */
#define ARCFLOW_UPDATE_LANES_16_BIT 8  /* for float16 and bfloat16 */
#define ARCFLOW_UPDATE_BLOCK_BYTES 16

#define ARCFLOW_EULER_THREADS 128

#define ARCFLOW_NOISE_THREADS 320       /* an MT19937 state of 624 words gives 312 pairs of numbers */
#define ARCFLOW_NOISE_SHARED_BYTES 4992 /* two states of 624 words */
#define ARCFLOW_NOISE_GROUP 16          /* the generator makes this many numbers of as many uniforms at a time */

/* Shares and scales of one token with K modes and P sub-pixels. */
#define ARCFLOW_UPDATE_TOKEN_FLOATS(modes, sub_pixels) ((2 * (modes) + 1) * (sub_pixels))

#endif
