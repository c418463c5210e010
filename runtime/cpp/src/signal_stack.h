// Keeps the calling thread's alternate signal stack as it was, for the C functions of the library.
#pragma once

#include <csignal>

namespace arcflow {

// A library that OpenVINO loads sets an alternate signal stack for the thread that calls it, and unmaps that stack when
// it is unloaded. The next signal would then end the program: a Ctrl-C in Python, for example, whose handlers run on
// it.
class KeptSignalStack {
public:
    KeptSignalStack() noexcept { known_ = sigaltstack(nullptr, &before_) == 0; }
    ~KeptSignalStack() {
        if (known_) sigaltstack(&before_, nullptr);
    }
    KeptSignalStack(const KeptSignalStack &) = delete;
    KeptSignalStack &operator=(const KeptSignalStack &) = delete;

private:
    stack_t before_{};
    bool known_ = false;
};

}  // namespace arcflow
