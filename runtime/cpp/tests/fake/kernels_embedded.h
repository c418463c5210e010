// Stands in for the generated header: the driver made of host memory takes any text of PTX that names the kernels, and
// runs their source built for the CPU.
#pragma once

#include <cstddef>

static const char kernels_source[] = "";
static const char kernels_fatbin[] =
    ".version 9.0 "
    "arcflow_noise_float32 arcflow_noise_float16 arcflow_noise_bfloat16 "
    "arcflow_update_float32_float32 arcflow_update_float32_float16 arcflow_update_float32_bfloat16 "
    "arcflow_update_float16_float32 arcflow_update_float16_float16 arcflow_update_float16_bfloat16 "
    "arcflow_update_bfloat16_float32 arcflow_update_bfloat16_float16 arcflow_update_bfloat16_bfloat16 "
    "arcflow_euler_float32_float32 arcflow_euler_float32_float16 arcflow_euler_float32_bfloat16 "
    "arcflow_euler_float16_float32 arcflow_euler_float16_float16 arcflow_euler_float16_bfloat16 "
    "arcflow_euler_bfloat16_float32 arcflow_euler_bfloat16_float16 arcflow_euler_bfloat16_bfloat16 ";
static const std::size_t kernels_fatbin_bytes = sizeof kernels_fatbin;
