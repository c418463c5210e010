/* ArcFlow's C API: load a bundle, generate images from prompts, read the results.
 *
 *     arcflow_pipeline *pipe = NULL;
 *     arcflow_result *result = NULL;
 *     const char *prompts[] = {"a large red circle on the left"};
 *     arcflow_request request = ARCFLOW_REQUEST_INIT;
 *     request.prompts = prompts;
 *     request.prompt_count = 1;
 *     if (arcflow_open("out/shapes-fp32", NULL, &pipe) || arcflow_generate(pipe, &request, &result))
 *         fprintf(stderr, "%s\n", arcflow_last_error());
 *     else
 *         write_rgb(arcflow_result_pixels(result), arcflow_result_width(result), arcflow_result_height(result));
 *     arcflow_result_free(result);
 *     arcflow_close(pipe);
 *
 * Ownership: the caller owns each object that a function returns through an out pointer, and frees it with the function
 * named there. A pointer that a function returns directly belongs to the object it was read from, and is valid as long
 * as that object. The library copies or only reads its arguments during the call. Text is UTF-8.
 *
 * Threads: any thread may call any function. Calls on one pipeline may run at the same time; each gives the same images
 * as when it runs alone. arcflow_close waits for running calls; later calls on that pipeline return ARCFLOW_CLOSED. Use
 * a result in one thread at a time.
 *
 * Errors: a function that can fail returns a status. On failure it sets its out pointer to NULL, and
 * arcflow_last_error() says in the calling thread what was wrong, what was expected and what to do. No C++ exception
 * leaves the library.
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

/* Changes when programs compiled against an older header stop working. */
#define ARCFLOW_ABI_VERSION 1

typedef enum arcflow_status {
    ARCFLOW_OK = 0,
    ARCFLOW_REQUEST_ERROR = 1, /* an argument is invalid; nothing was run */
    ARCFLOW_BUNDLE_ERROR = 2,  /* the bundle is missing, damaged or of another version */
    ARCFLOW_ENGINE_ERROR = 3,  /* an engine cannot run the bundle, or failed */
    ARCFLOW_CLOSED = 4,        /* the pipeline was closed, or the pointer is not a pipeline */
    ARCFLOW_OUT_OF_MEMORY = 5,
    ARCFLOW_INTERNAL_ERROR = 6, /* a bug in the library; please report it with the error text */
    ARCFLOW_LORA_ERROR = 7      /* a LoRA file is missing or damaged, or does not fit the bundle */
} arcflow_status;

typedef struct arcflow_pipeline arcflow_pipeline;
typedef struct arcflow_lora arcflow_lora;
typedef struct arcflow_result arcflow_result;

/* The loaded library's ARCFLOW_ABI_VERSION, and its version, such as "0.1.0". */
ARCFLOW_API uint32_t arcflow_abi_version(void);
ARCFLOW_API const char *arcflow_version(void);

/* Text of the calling thread's last failure, valid until its next call; "" if its last call succeeded. Never NULL. */
ARCFLOW_API const char *arcflow_last_error(void);

/* How to load a bundle. Start with ARCFLOW_OPTIONS_INIT and set what you need; zero selects the default. */
typedef struct arcflow_options {
    size_t struct_size;
    const char *backend; /* "openvino" (default), "tensorrt" or "tensorrt-rtx"; see arcflow_backends() */
    int32_t threads;     /* CPU threads per engine; 0: one per core */
    int32_t low_memory;  /* nonzero: as memory "low" */
    int32_t full_check;  /* nonzero: hash every file of the bundle, not only files up to 64 MiB */
    const char *memory;  /* "resident", "balanced" or "low": which parts stay loaded; NULL: by the free memory */
} arcflow_options;
#define ARCFLOW_OPTIONS_INIT {sizeof(arcflow_options), NULL, 0, 0, 0, NULL}

/* The backends in this build, separated by commas; the first is the default. */
ARCFLOW_API const char *arcflow_backends(void);

/* Check and load the bundle in the directory `bundle`. `options` may be NULL. Free with arcflow_close. */
ARCFLOW_API arcflow_status arcflow_open(const char *bundle, const arcflow_options *options,
                                        arcflow_pipeline **pipeline);

/* Wait for running calls, then free the pipeline. NULL and a pipeline that is already closed are ignored. */
ARCFLOW_API void arcflow_close(arcflow_pipeline *pipeline);

/* The pipeline's memory mode, given or chosen by default; "" if the pipeline is closed. The text is never freed. */
ARCFLOW_API const char *arcflow_memory(const arcflow_pipeline *pipeline);

/* Read a LoRA for requests of this pipeline; the bundle must have slots. `path` is a file that `arcflow lora convert`
 * wrote. Free with arcflow_lora_close. */
ARCFLOW_API arcflow_status arcflow_lora_open(arcflow_pipeline *pipeline, const char *path, arcflow_lora **lora);

/* Free a LoRA; running requests that have it finish unchanged. NULL and a LoRA that is already closed are ignored. */
ARCFLOW_API void arcflow_lora_close(arcflow_lora *lora);

/* A LoRA of a request. A scale of 1 is the LoRA as it was trained, 0 is none. */
typedef struct arcflow_scaled_lora {
    const arcflow_lora *lora;
    float scale;
} arcflow_scaled_lora;

/* Token ids of one prompt, as its tokenizers return them, special tokens included, not padded. FLUX: CLIP's ids in
 * `ids`, T5's in `ids_2`. Qwen-Image: the ids of the whole chat template in `ids`; `ids_2` is empty. */
typedef struct arcflow_tokens {
    const int64_t *ids;
    size_t count;
    const int64_t *ids_2;
    size_t count_2;
} arcflow_tokens;

/* Called after each step with the step's index and the latents [batch, tokens, channels], valid during the call. Return
 * 0 to continue; any other value ends the request with ARCFLOW_REQUEST_ERROR. Do not use the same pipeline in it. */
typedef int (*arcflow_step_callback)(void *user, int32_t step, const float *latents, size_t count);

/* What to generate. Start with ARCFLOW_REQUEST_INIT and set either `prompts` or `tokens`, and `prompt_count`. */
typedef struct arcflow_request {
    size_t struct_size;
    const char *const *prompts; /* [prompt_count], UTF-8 */
    const arcflow_tokens *tokens;
    size_t prompt_count;
    int32_t num_images_per_prompt;    /* 0: 1 */
    int32_t height, width;            /* pixels; 0: 1024, or the nearest size that the bundle allows */
    int32_t num_inference_steps;      /* 0: the bundle's default, usually 2 */
    int32_t max_sequence_length;      /* text tokens; 0: the bundle's maximum */
    float guidance_scale;             /* negative: 3.5; students without guidance ignore it */
    const uint64_t *seeds;            /* one for the whole batch, or one per image; NULL: random ones */
    size_t seed_count;                /* pass a negative seed of torch as its two's complement */
    int32_t skip_decode;              /* nonzero: return only the latents, no pixels */
    arcflow_step_callback on_step;    /* may be NULL */
    void *user;                       /* passed to on_step */
    const arcflow_scaled_lora *loras; /* [lora_count], for all images; each LoRA once */
    size_t lora_count;
    /* Guidance by a negative prompt, for models such as Qwen-Image itself: two network calls in each step. Set one of
     * the two; " " is the usual negative prompt. NULL: not guided. */
    const char *const *negative_prompts; /* [negative_prompt_count], UTF-8 */
    const arcflow_tokens *negative_tokens;
    size_t negative_prompt_count; /* prompt_count, or 1 for all prompts */
    float true_cfg_scale;         /* 0: the bundle's; up to 1: not guided; ignored without a negative prompt */
} arcflow_request;
#define ARCFLOW_REQUEST_INIT \
    {sizeof(arcflow_request), NULL, NULL, 0, 0, 0, 0, 0, 0, -1.0f, NULL, 0, 0, NULL, NULL, NULL, 0, NULL, NULL, 0, 0}

/* Generate num_images_per_prompt images of each prompt, prompt by prompt. Free with arcflow_result_free. */
ARCFLOW_API arcflow_status arcflow_generate(arcflow_pipeline *pipeline, const arcflow_request *request,
                                            arcflow_result **result);
ARCFLOW_API void arcflow_result_free(arcflow_result *result);

ARCFLOW_API int32_t arcflow_result_batch(const arcflow_result *result);
ARCFLOW_API int32_t arcflow_result_height(const arcflow_result *result);
ARCFLOW_API int32_t arcflow_result_width(const arcflow_result *result);

/* The images as RGB bytes, [batch, height, width, 3]; NULL with skip_decode. */
ARCFLOW_API const uint8_t *arcflow_result_pixels(const arcflow_result *result);

/* The latents of the images, [batch, tokens, channels]. `tokens` and `channels` receive their sizes, and may be NULL.
 */
ARCFLOW_API const float *arcflow_result_latents(const arcflow_result *result, int32_t *tokens, int32_t *channels);

/* The seeds that reproduce these images; `count` receives their number, 1 or batch, and may be NULL. */
ARCFLOW_API const uint64_t *arcflow_result_seeds(const arcflow_result *result, size_t *count);

/* The warnings, one per line; "" if there are none. */
ARCFLOW_API const char *arcflow_result_warnings(const arcflow_result *result);

/* The time of each stage in milliseconds, as JSON: {"tokenize": 0.02, ...}. */
ARCFLOW_API const char *arcflow_result_timings(const arcflow_result *result);

/* Fill `noise` with `count` standard normal float32 numbers, equal bit for bit to torch.randn with a CPU generator. */
ARCFLOW_API arcflow_status arcflow_noise(uint64_t seed, size_t count, float *noise);

#ifdef __cplusplus
}
#endif
#endif
