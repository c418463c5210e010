// Checks for the test programs: the first failure is printed and ends the program.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

inline void check(bool good, const char *what, const char *file, int line) {
    if (good) return;
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
    std::exit(1);
}

#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)

// Run `work`, which must throw an `Exception`, and return its text.
template <class Exception, class Work> std::string thrown(const Work &work) {
    try {
        work();
    } catch (const Exception &e) {
        return e.what();
    }
    return "nothing was thrown";
}
