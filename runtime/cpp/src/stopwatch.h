// Times of a request's stages, in milliseconds, in the order in which the stages were first entered.
#pragma once

#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace arcflow {

// One per request, not shared between threads.
class Stopwatch {
    using Clock = std::chrono::steady_clock;

public:
    // Adds the time until its end to a stage.
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

    // Adds what was measured elsewhere.
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
