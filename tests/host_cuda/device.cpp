// The device, its context, the names of errors, and cuGetProcAddress.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "driver.h"
#include "errors.inc"  // NAMES, made from cuda.h by build.py

struct CUctx_st {};

namespace host_cuda {
namespace {

constexpr int version = CUDA_VERSION, major = 8, minor = 9;

CUctx_st primary;
thread_local std::vector<CUcontext> stack;

const char *text_of(CUresult error, const char *ErrorName::*member) {
    for (const ErrorName &name : NAMES)
        if (name.error == error) return name.*member;
    return nullptr;
}

void *loaded(const std::string &name) {
    Dl_info self;
    if (dladdr(reinterpret_cast<void *>(&loaded), &self) == 0) return nullptr;
    void *const library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : dlsym(library, name.c_str());
}

}  // namespace

CUcontext current_context() { return stack.empty() ? nullptr : stack.back(); }

}  // namespace host_cuda

using namespace host_cuda;

extern "C" {

CUresult cuInit(unsigned) {
    HOST_CUDA_CALL(driver);
    if (!state().present) return CUDA_ERROR_NO_DEVICE;
    state().initialized = true;
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *made_for) {
    HOST_CUDA_CALL(nothing);
    *made_for = version;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = text_of(error, &ErrorName::name);
    return *name == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = text_of(error, &ErrorName::text);
    return *text == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetProcAddress(const char *symbol, void **function, int, cuuint64_t, CUdriverProcAddressQueryResult *found) {
    HOST_CUDA_CALL(nothing);
    *function = nullptr;
    for (const char *suffix : {"_v3", "_v2", ""})  // the newest version that exists
        if (*function == nullptr) *function = loaded(std::string(symbol) + suffix);
    if (found != nullptr)
        *found = *function == nullptr ? CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND : CU_GET_PROC_ADDRESS_SUCCESS;
    return *function == nullptr && found == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

// NVRTC calls this, and works without a table.
CUresult cuGetExportTable(const void **table, const CUuuid *) {
    *table = nullptr;
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuDeviceGetCount(int *count) {
    HOST_CUDA_CALL(driver);
    *count = state().present ? 1 : 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int number) {
    HOST_CUDA_CALL(driver);
    if (number != 0 || !state().present) return CUDA_ERROR_INVALID_DEVICE;
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int size, CUdevice) {
    HOST_CUDA_CALL(driver);
    std::snprintf(name, static_cast<size_t>(size), "%s", "Host memory");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice) {
    HOST_CUDA_CALL(driver);
    std::memset(uuid, 1, sizeof *uuid);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice) {
    HOST_CUDA_CALL(driver);
    *bytes = memory();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    HOST_CUDA_CALL(driver);
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = major;
            break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = minor;
            break;
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
            *value = 1;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            *value = 1024;
            break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
            *value = 32;
            break;
        default:
            *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) {
    HOST_CUDA_CALL(driver);
    ++state().contexts;
    *context = &primary;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) {
    HOST_CUDA_CALL(driver);
    if (state().contexts == 0) return CUDA_ERROR_INVALID_CONTEXT;
    --state().contexts;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    HOST_CUDA_CALL(driver);
    if (!stack.empty()) stack.pop_back();
    if (context != nullptr) stack.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    HOST_CUDA_CALL(driver);
    *context = current_context();
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
    HOST_CUDA_CALL(driver);
    stack.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext *context) {
    HOST_CUDA_CALL(driver);
    if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context != nullptr) *context = stack.back();
    stack.pop_back();
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
    HOST_CUDA_CALL(context);
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    HOST_CUDA_CALL(context);
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = -5;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
    HOST_CUDA_CALL(context);
    if (!state().captures.empty()) {
        for (const auto &capture : state().captures) invalidate(*capture);
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    std::vector<Stream> all = state().unnamed;
    all.push_back(state().legacy);
    for (const auto &[handle, stream] : state().streams) all.push_back(stream);
    for (const Stream &stream : all) wait(call.lock, {stream, stream->submitted});
    return state().lost;
}
}
