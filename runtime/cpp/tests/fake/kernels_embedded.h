// Stands in for the generated header; fake_cuda.cpp loads any module.
#pragma once

#include <cstddef>

static const char kernels_source[] = "";
static const unsigned char kernels_fatbin[] = {0};
static const std::size_t kernels_fatbin_bytes = 1;
