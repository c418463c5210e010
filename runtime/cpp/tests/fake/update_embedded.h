// In place of the embedded kernel: fake_cuda.cpp loads anything.
#pragma once

#include <cstddef>

static const char update_source[] = "";
static const unsigned char update_fatbin[] = {0};
static const std::size_t update_fatbin_bytes = 1;
