/* The public header as C11, under the library's warnings. */
#include "arcflow/arcflow.h"

#include <stdio.h>

int header_c11(void);

int header_c11(void) {
    arcflow_options options = ARCFLOW_OPTIONS_INIT;
    arcflow_request request = ARCFLOW_REQUEST_INIT;
    arcflow_pipeline *pipeline = NULL;
    const arcflow_status status = arcflow_open("bundle", &options, &pipeline);
    if (status != ARCFLOW_OK) printf("%s\n", arcflow_last_error());
    arcflow_close(pipeline);
    return request.guidance_scale < 0.0f ? (int)status : -1;
}
