// Measures the stages of a request, in milliseconds; stages keep the order in which they first started.
#pragma once

#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace arcflow {

// Used by one request; not thread-safe.
class Stopwatch {
    using Clock = std::chrono::steady_clock;

public:
    // Adds its own lifetime to a stage.
    class Running {
    public:
        Running(Stopwatch &watch, std::size_t stage) : watch_(watch), stage_(stage), start_(Clock::now()) {}
        Running(const Running &) = delete;
        Running &operator=(const Running &) = delete;
        ~Running() {
            watch_.ms_[stage_].second += std::chrono::duration<double, std::milli>(Clock::now() - start_).count();
        }

    private:
        Stopwatch &watch_;
        std::size_t stage_;
        Clock::time_point start_;
    };

    [[nodiscard]] Running operator()(const char *stage) { return {*this, place_of(stage)}; }

    // Add a time that was measured elsewhere.
    void add(const std::string &stage, double ms) { ms_[place_of(stage)].second += ms; }

    const std::vector<std::pair<std::string, double>> &ms() const { return ms_; }

private:
    std::size_t place_of(const std::string &stage) {
        std::size_t i = 0;
        while (i < ms_.size() && ms_[i].first != stage) ++i;
        if (i == ms_.size()) ms_.emplace_back(stage, 0.0);
        return i;
    }

    std::vector<std::pair<std::string, double>> ms_;
};

}  // namespace arcflow
