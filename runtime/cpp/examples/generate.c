/* Generates one image of a prompt and writes it as a PPM file: generate BUNDLE PROMPT OUT.ppm [SEED [NEGATIVE_PROMPT]]
 */
#include <arcflow/arcflow.h>
#include <stdio.h>
#include <stdlib.h>

static int write_ppm(const char *path, const arcflow_result *result) {
    const size_t width = (size_t)arcflow_result_width(result), height = (size_t)arcflow_result_height(result);
    FILE *file = fopen(path, "wb");
    if (file == NULL) return 0;
    int whole = fprintf(file, "P6\n%zu %zu\n255\n", width, height) > 0;
    whole = fwrite(arcflow_result_pixels(result), 3, width * height, file) == width * height && whole;
    return fclose(file) == 0 && whole;
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s BUNDLE PROMPT OUT.ppm [SEED [NEGATIVE_PROMPT]]\n", argv[0]);
        return 2;
    }
    const char *prompts[] = {argv[2]};
    const uint64_t seed = argc > 4 ? strtoull(argv[4], NULL, 10) : 0;
    arcflow_request request = ARCFLOW_REQUEST_INIT;
    request.prompts = prompts;
    request.prompt_count = 1;
    if (argc > 4) {
        request.seeds = &seed;
        request.seed_count = 1;
    }
    const char *negatives[] = {argc > 5 ? argv[5] : NULL};
    if (argc > 5) {
        request.negative_prompts = negatives;
        request.negative_prompt_count = 1;
    }
    arcflow_pipeline *pipe = NULL;
    arcflow_result *result = NULL;
    int code = 1;
    if (arcflow_open(argv[1], NULL, &pipe) || arcflow_generate(pipe, &request, &result))
        fprintf(stderr, "%s\n", arcflow_last_error());
    else if (!write_ppm(argv[3], result)) perror(argv[3]);
    else code = 0;
    arcflow_result_free(result);
    arcflow_close(pipe);
    return code;
}
