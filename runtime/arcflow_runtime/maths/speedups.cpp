// Noise and update compiled, for arcflow_runtime/maths/noise.py and update.py, which compute the same with numpy where
// this module was not built. Arrays come as buffers, C-contiguous and float32; sizes are checked against them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>
#include <vector>

#include "noise_host.h"
#include "update_host.h"

namespace {

// The arrays of one call, given back at its end.
struct Buffers {
    Py_buffer views[5];
    int count = 0;

    ~Buffers() {
        while (count > 0) PyBuffer_Release(&views[--count]);
    }
    // Whether each is as many float32 numbers as said; else there is an error.
    bool have(const Py_ssize_t (&numbers)[5], int of) {
        count = of;
        for (int i = 0; i < of; ++i) {
            if (views[i].len == numbers[i] * static_cast<Py_ssize_t>(sizeof(float))) continue;
            PyErr_Format(PyExc_ValueError, "array %d must have %zd float32 numbers, got %zd bytes", i, numbers[i],
                         views[i].len);
            return false;
        }
        return true;
    }
    float *floats(int i) { return static_cast<float *>(views[i].buf); }
};

// randn(seed, out): fills `out` with what the low 32 bits of `seed` give.
PyObject *randn(PyObject *, PyObject *arguments) {
    unsigned int seed;
    Buffers b;
    if (!PyArg_ParseTuple(arguments, "Iw*", &seed, &b.views[0])) return nullptr;
    const Py_ssize_t count = b.views[0].len / static_cast<Py_ssize_t>(sizeof(float));
    if (!b.have({count}, 1)) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    arcflow_random::randn(seed, static_cast<std::size_t>(count), b.floats(0));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

// update(means [T, K, C], logweights [T, K, P], loggammas [T, K-1, P], latents [T, C], out [T, C], K, C, P, step)
PyObject *update(PyObject *, PyObject *arguments) {
    Buffers b;
    Py_ssize_t modes, channels, sub_pixels;
    double step;
    if (!PyArg_ParseTuple(arguments, "y*y*y*y*w*nnnd", &b.views[0], &b.views[1], &b.views[2], &b.views[3], &b.views[4],
                          &modes, &channels, &sub_pixels, &step))
        return nullptr;
    b.count = 5;
    constexpr Py_ssize_t most = 1 << 20;
    if (modes < 1 || modes > most || channels < 1 || channels > most || sub_pixels < 1 || channels % sub_pixels != 0) {
        PyErr_SetString(PyExc_ValueError, "modes, channels or sub-pixels are out of range");
        return nullptr;
    }
    const Py_ssize_t tokens = b.views[3].len / (channels * static_cast<Py_ssize_t>(sizeof(float)));
    const Py_ssize_t weights = tokens * modes * sub_pixels;
    if (!b.have(
            {tokens * modes * channels, weights, weights - tokens * sub_pixels, tokens * channels, tokens * channels},
            5))
        return nullptr;
    const arcflow_update::Sizes n{static_cast<std::size_t>(modes), static_cast<std::size_t>(channels),
                                  static_cast<std::size_t>(sub_pixels)};
    try {
        std::vector<double> shares(n.modes);
        std::vector<float> scratch(n.modes * n.sub_pixels + 2 * n.channels);
        Py_BEGIN_ALLOW_THREADS
        float *const coefficients = scratch.data(), *const row = coefficients + n.modes * n.sub_pixels;
        for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
            float *const out = b.floats(4) + t * n.channels;
            std::memcpy(out, b.floats(3) + t * n.channels, n.channels * sizeof(float));
            arcflow_update::coefficients(b.floats(1) + t * n.modes * n.sub_pixels,
                                         b.floats(2) + t * (n.modes - 1) * n.sub_pixels, n, step, shares.data(),
                                         coefficients);
            arcflow_update::mix(b.floats(0) + t * n.modes * n.channels, coefficients, n, row, row + n.channels, out);
        }
        Py_END_ALLOW_THREADS
    } catch (const std::bad_alloc &) {
        return PyErr_NoMemory();
    }
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"randn", randn, METH_VARARGS, nullptr}, {"update", update, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_speedups", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__speedups() { return PyModule_Create(&definition); }
