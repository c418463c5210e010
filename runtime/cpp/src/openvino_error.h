// Shortens an OpenVINO exception to one line.
#pragma once

#include <algorithm>
#include <exception>
#include <string>

namespace arcflow {

// The line that says what is wrong. OpenVINO's texts begin with lines that name its own source files and checks.
inline std::string useful_line(const std::exception &error) {
    const std::string text = error.what();
    std::string first, useful;
    for (size_t start = 0; start < text.size();) {
        const size_t end = std::min(text.find('\n', start), text.size());
        std::string line = text.substr(start, end - start);
        start = end + 1;
        line.erase(0, line.find_first_not_of(" \t"));
        if (line.empty()) continue;
        if (first.empty()) first = line;
        const bool own =
            line.rfind("Exception from ", 0) == 0 || line.rfind("Check '", 0) == 0 || line.rfind("src/", 0) == 0;
        if (!own && useful.empty()) useful = line;
    }
    if (useful.empty()) useful = first;
    return useful.empty() ? "no reason given" : useful;
}

}  // namespace arcflow
