/* Calls the installed library: its ABI version must be the header's, and a missing bundle must be an error. */
#include <arcflow/arcflow.h>

#include <stdio.h>
#include <string.h>

int main(void) {
    arcflow_pipeline *pipeline = NULL;
    float noise[16];
    printf("libarcflow %s with %s\n", arcflow_version(), arcflow_backends());
    if (arcflow_abi_version() != ARCFLOW_ABI_VERSION) return 1;
    if (arcflow_noise(0, 16, noise) != ARCFLOW_OK) return 2;
    if (arcflow_open("no such folder", NULL, &pipeline) != ARCFLOW_BUNDLE_ERROR || pipeline != NULL) return 3;
    return strstr(arcflow_last_error(), "no such folder is not a directory") ? 0 : 4;
}
