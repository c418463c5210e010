/* ArcFlow: draw with a two-step text-to-image bundle from C, C++ or any language that calls C.
 *
 *     arcflow_pipeline *pipe = NULL;
 *     arcflow_result *result = NULL;
 *     const char *prompts[] = {"a large red circle on the left"};
 *     arcflow_request request = ARCFLOW_REQUEST_INIT;
 *     request.prompts = prompts;
 *     request.prompt_count = 1;
 *     if (arcflow_open("out/shapes-fp32", NULL, &pipe) || arcflow_draw(pipe, &request, &result))
 *         fprintf(stderr, "%s\n", arcflow_last_error());
 *     else
 *         write_rgb(arcflow_result_pixels(result), arcflow_result_width(result), arcflow_result_height(result));
 *     arcflow_result_free(result);
 *     arcflow_close(pipe);
 *
 * Ownership: what a function gives through an out pointer belongs to the caller, who frees it with the function named
 * there. What a function returns by pointer belongs to the object it was asked of and lives as long as that. Arguments
 * are copied or only read during the call. Text is UTF-8.
 *
 * Threads: every function may be called from any thread. Calls on one pipeline may run at the same time and give the
 * same pictures as one after the other. arcflow_close waits for calls in progress; a pipeline used after it, also by a
 * thread that lost the race, gives ARCFLOW_CLOSED. A result belongs to one thread at a time.
 *
 * Errors: functions that can fail return a status. On failure out pointers are set to NULL and arcflow_last_error()
 * tells the calling thread what was wrong, what was expected and what to do. No exception leaves the library.
 */
#ifndef ARCFLOW_H
#define ARCFLOW_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#ifdef ARCFLOW_BUILD
#define ARCFLOW_API __declspec(dllexport)
#else
#define ARCFLOW_API __declspec(dllimport)
#endif
#else
#define ARCFLOW_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes when a program compiled against an older header could no longer run. */
#define ARCFLOW_ABI_VERSION 1

typedef enum arcflow_status {
    ARCFLOW_OK = 0,
    ARCFLOW_REQUEST_ERROR = 1, /* an argument is out of range; nothing was run */
    ARCFLOW_BUNDLE_ERROR = 2,  /* the bundle is missing, damaged or of another version */
    ARCFLOW_ENGINE_ERROR = 3,  /* an engine cannot run the bundle, or failed */
    ARCFLOW_CLOSED = 4,        /* the pipeline was closed, or is no pipeline */
    ARCFLOW_OUT_OF_MEMORY = 5,
    ARCFLOW_INTERNAL_ERROR = 6 /* a fault of the library; please report it with the text */
} arcflow_status;

typedef struct arcflow_pipeline arcflow_pipeline;
typedef struct arcflow_result arcflow_result;

/* ARCFLOW_ABI_VERSION of the library that is loaded, and its version, such as "0.1.0". */
ARCFLOW_API uint32_t arcflow_abi_version(void);
ARCFLOW_API const char *arcflow_version(void);

/* Text of the last failure on the calling thread, until its next call; "" if there was none. Never NULL. */
ARCFLOW_API const char *arcflow_last_error(void);

/* How to load. Begin with ARCFLOW_OPTIONS_INIT and set what differs: zeros are the defaults. */
typedef struct arcflow_options {
    size_t struct_size;
    const char *backend; /* "openvino" (default), "tensorrt" or "tensorrt-rtx"; arcflow_backends() lists them */
    int32_t threads;     /* CPU threads per engine; 0: one per core */
    int32_t low_memory;  /* not 0: open each part only while it is used, one at a time */
    int32_t full_check;  /* not 0: hash every file of the bundle, not only those up to 64 MiB */
} arcflow_options;
#define ARCFLOW_OPTIONS_INIT {sizeof(arcflow_options), NULL, 0, 0, 0}

/* The engines this library was built with, separated by commas. */
ARCFLOW_API const char *arcflow_backends(void);

/* Check and load the bundle in a directory; `options` may be NULL. Free with arcflow_close. */
ARCFLOW_API arcflow_status arcflow_open(const char *bundle, const arcflow_options *options,
                                        arcflow_pipeline **pipeline);

/* Wait for calls in progress and free the pipeline; NULL, and closing twice, are allowed. */
ARCFLOW_API void arcflow_close(arcflow_pipeline *pipeline);

/* One prompt's token ids, in place of its text, as the tokenizers would give them, special tokens included. FLUX:
 * CLIP's ids in `ids`, T5's in `ids_2`; both are padded by the library. Qwen-Image: the whole template in `ids`. */
typedef struct arcflow_tokens {
    const int64_t *ids;
    size_t count;
    const int64_t *ids_2;
    size_t count_2;
} arcflow_tokens;

/* Called after each step with its index and the latents [batch, tokens, channels], valid during the call. Return 0 to
 * go on; anything else stops the call with ARCFLOW_REQUEST_ERROR. It must not call functions on the same pipeline. */
typedef int (*arcflow_step_callback)(void *user, int32_t step, const float *latents, size_t count);

/* What to draw. Begin with ARCFLOW_REQUEST_INIT, and give either prompts or tokens. */
typedef struct arcflow_request {
    size_t struct_size;
    const char *const *prompts; /* prompt_count of them */
    const arcflow_tokens *tokens;
    size_t prompt_count;
    int32_t num_images_per_prompt; /* 0: 1 */
    int32_t height, width;         /* pixels; 0: 1024, or the nearest the bundle allows */
    int32_t num_inference_steps;   /* network calls; 0: the bundle's, usually 2 */
    int32_t max_sequence_length;   /* text tokens; 0: the bundle's */
    float guidance_scale;          /* negative: 3.5, where the student takes guidance */
    const uint64_t *seeds;         /* one for the whole batch, or one per image; NULL: a random one */
    size_t seed_count;             /* a negative seed of torch is given as its two's complement */
    int32_t skip_decode;           /* not 0: only the latents are wanted, pixels stay empty */
    arcflow_step_callback on_step; /* may be NULL */
    void *user;                    /* given to on_step */
} arcflow_request;
#define ARCFLOW_REQUEST_INIT {sizeof(arcflow_request), NULL, NULL, 0, 0, 0, 0, 0, 0, -1.0f, NULL, 0, 0, NULL, NULL}

/* Draw num_images_per_prompt pictures of each prompt, prompt by prompt. Free with arcflow_result_free. */
ARCFLOW_API arcflow_status arcflow_draw(arcflow_pipeline *pipeline, const arcflow_request *request,
                                        arcflow_result **result);
ARCFLOW_API void arcflow_result_free(arcflow_result *result);

ARCFLOW_API int32_t arcflow_result_batch(const arcflow_result *result);
ARCFLOW_API int32_t arcflow_result_height(const arcflow_result *result);
ARCFLOW_API int32_t arcflow_result_width(const arcflow_result *result);

/* RGB, [batch, height, width, 3]; NULL with skip_decode. */
ARCFLOW_API const uint8_t *arcflow_result_pixels(const arcflow_result *result);

/* The latents behind the pictures, [batch, tokens, channels]; the two sizes go to pointers that may be NULL. */
ARCFLOW_API const float *arcflow_result_latents(const arcflow_result *result, int32_t *tokens, int32_t *channels);

/* The seeds that draw the same noise again: 1 or batch of them. */
ARCFLOW_API const uint64_t *arcflow_result_seeds(const arcflow_result *result, size_t *count);

/* Warnings, one a line, "" if there were none; and the stages' times as JSON, {"tokenize": 0.02, ...} in ms: wall
   times, and on a GPU those of its own events. */
ARCFLOW_API const char *arcflow_result_warnings(const arcflow_result *result);
ARCFLOW_API const char *arcflow_result_timings(const arcflow_result *result);

/* The noise that a seed draws, torch.randn of a CPU generator, [count] float32. */
ARCFLOW_API arcflow_status arcflow_noise(uint64_t seed, size_t count, float *noise);

#ifdef __cplusplus
}
#endif
#endif
