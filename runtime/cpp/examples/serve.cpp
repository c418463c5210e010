// An HTTP service: serve BUNDLE [--host H] [--port N] [--workers N] [--queue N] [--threads N]
//
//     curl -d '{"prompt": "a large red circle", "seed": 42}' localhost:8080/generate > image.png
//
// POST /generate takes a JSON object with `prompt` and, optionally, `seed`, `height`, `width`, `num_inference_steps`,
// `negative_prompt` and `true_cfg_scale`, and returns a PNG, with the seed in the header X-Seed. GET /healthz returns
// "ok". Errors are JSON objects: 400 for a wrong request, 503 if too many requests wait or the pipeline is closed, 500
// otherwise. On SIGTERM and SIGINT the service finishes the running requests, then stops.
#include <httplib.h>
#include <arcflow/arcflow.hpp>
#include <nlohmann/json.hpp>

#include <signal.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <thread>

#include "png.h"

namespace {

struct Arguments {
    std::string bundle, host = "127.0.0.1";
    int port = 8080, workers = 2, queue = 16, threads = 0;  // port 0: any free port; threads: see Options
};

// The client's request is wrong; answered with 400.
struct BadRequest : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Lets `workers` requests run and `queue` requests wait at a time; `enter` is false for the others.
class Gate {
public:
    Gate(int workers, int queue) : free_(workers), room_(queue) {}

    bool enter() {
        std::unique_lock lock(lock_);
        if (free_ == 0) {
            if (room_ == 0) return false;
            --room_;
            left_.wait(lock, [&] { return free_ > 0; });
            ++room_;
        }
        --free_;
        return true;
    }

    void leave() {
        const std::lock_guard lock(lock_);
        ++free_;
        left_.notify_one();
    }

private:
    std::mutex lock_;
    std::condition_variable left_;
    int free_, room_;
};

// Leaves the gate when a request ends, also by an exception.
struct Inside {
    Gate &gate;
    ~Inside() { gate.leave(); }
};

// An integer of the request, which must fit in `Int`.
template <class Int> Int integer(const std::string &key, const nlohmann::json &value) {
    if (value.is_number_unsigned() && value.get<std::uint64_t>() <= std::numeric_limits<Int>::max())
        return value.get<Int>();
    throw BadRequest(key + " must be an integer from 0 to " + std::to_string(std::numeric_limits<Int>::max()));
}

// A seed as Python takes it: a negative one stands for its two's complement.
std::uint64_t seed_of(const nlohmann::json &value) {
    if (value.is_number_integer() && !value.is_number_unsigned())
        return static_cast<std::uint64_t>(value.get<int64_t>());
    if (value.is_number_unsigned()) return value.get<std::uint64_t>();
    throw BadRequest("seed must be an integer from -2**63 to 2**64 - 1");
}

arcflow::Request parse(const std::string &body) {
    const nlohmann::json json = nlohmann::json::parse(body, nullptr, false);
    if (!json.is_object()) throw BadRequest("the body must be a JSON object such as {\"prompt\": \"a red circle\"}");
    arcflow::Request request;
    for (const auto &[key, value] : json.items())
        if (key == "prompt" && value.is_string()) request.prompts = {value.get<std::string>()};
        else if (key == "prompt") throw BadRequest("prompt must be a string");
        else if (key == "seed") request.seeds = {seed_of(value)};
        else if (key == "height") request.height = integer<int>(key, value);
        else if (key == "width") request.width = integer<int>(key, value);
        else if (key == "num_inference_steps") request.num_inference_steps = integer<int>(key, value);
        else if (key == "negative_prompt" && value.is_string()) request.negative_prompts = {value.get<std::string>()};
        else if (key == "negative_prompt") throw BadRequest("negative_prompt must be a string");
        else if (key == "true_cfg_scale" && value.is_number()) request.true_cfg_scale = value.get<float>();
        else if (key == "true_cfg_scale") throw BadRequest("true_cfg_scale must be a number");
        else {
            throw BadRequest("unknown key '" + key +
                             "'; it must be prompt, seed, height, width, num_inference_steps, negative_prompt or "
                             "true_cfg_scale");
        }
    if (request.prompts.empty()) throw BadRequest("prompt is missing");
    return request;
}

void fail(httplib::Response &response, int status, const std::string &text) {
    response.status = status;
    const auto replace = nlohmann::json::error_handler_t::replace;
    response.set_content(nlohmann::json{{"error", text}}.dump(-1, ' ', false, replace), "application/json");
}

int http_status(arcflow_status status) {
    switch (status) {
        case ARCFLOW_REQUEST_ERROR:
            return 400;
        case ARCFLOW_CLOSED:
        case ARCFLOW_OUT_OF_MEMORY:
            return 503;
        default:
            return 500;
    }
}

void generate(const arcflow::Pipeline &pipe, Gate &gate, const httplib::Request &asked, httplib::Response &response) {
    try {
        const arcflow::Request request = parse(asked.body);
        if (!gate.enter()) {
            response.set_header("Retry-After", "1");
            return fail(response, 503, "too many requests are waiting; try again later");
        }
        const Inside inside{gate};
        const arcflow::Result result = pipe.generate(request);
        response.set_header("X-Seed", std::to_string(result.seeds()[0]));
        response.set_content(png::encode(result.pixels().data(), result.width(), result.height()), "image/png");
    } catch (const BadRequest &e) {
        fail(response, 400, e.what());
    } catch (const arcflow::Error &e) {
        fail(response, http_status(e.status()), e.what());
    } catch (const std::exception &e) {
        fail(response, 500, e.what());
    }
}

Arguments read_arguments(int argc, char **argv) {
    Arguments out;
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        const bool option = name.rfind("--", 0) == 0;
        if (!option && out.bundle.empty()) {
            out.bundle = name;
            continue;
        }
        if (!option || ++i == argc) throw std::invalid_argument("unexpected " + name);
        if (name == "--host") out.host = argv[i];
        else if (name == "--port") out.port = std::stoi(argv[i]);
        else if (name == "--workers") out.workers = std::stoi(argv[i]);
        else if (name == "--queue") out.queue = std::stoi(argv[i]);
        else if (name == "--threads") out.threads = std::stoi(argv[i]);
        else throw std::invalid_argument("unknown option " + name);
    }
    if (out.bundle.empty() || out.workers < 1 || out.queue < 0) throw std::invalid_argument("bad arguments");
    return out;
}

void serve(const Arguments &arguments) {
    // Block the signals before any thread starts, so that only the thread below receives them.
    sigset_t stops;
    sigemptyset(&stops);
    sigaddset(&stops, SIGTERM);
    sigaddset(&stops, SIGINT);
    pthread_sigmask(SIG_BLOCK, &stops, nullptr);

    arcflow::Options options;
    options.threads = arguments.threads;
    const arcflow::Pipeline pipe(arguments.bundle, options);
    Gate gate(arguments.workers, arguments.queue);

    httplib::Server server;
    // There is a thread for each request, so that a refusal or a health check need not wait for an image.
    const auto threads = static_cast<std::size_t>(arguments.workers) + static_cast<std::size_t>(arguments.queue) + 2;
    server.new_task_queue = [threads] { return new httplib::ThreadPool(threads); };
    server.set_keep_alive_max_count(1);
    server.set_read_timeout(5);
    server.set_write_timeout(5);
    server.set_payload_max_length(64 * 1024);
    server.Get("/healthz", [](const httplib::Request &, httplib::Response &response) {
        response.set_content("ok\n", "text/plain");
    });
    server.Post("/generate", [&](const httplib::Request &asked, httplib::Response &response) {
        generate(pipe, gate, asked, response);
    });

    const int port = arguments.port == 0                                   ? server.bind_to_any_port(arguments.host)
                     : server.bind_to_port(arguments.host, arguments.port) ? arguments.port
                                                                           : -1;
    if (port < 0) {
        throw std::runtime_error("cannot listen on " + arguments.host + ":" + std::to_string(arguments.port) +
                                 "; is the port taken?");
    }
    std::printf("listening on http://%s:%d\n", arguments.host.c_str(), port);
    std::fflush(stdout);
    std::thread stopper([&] {
        int signal = 0;
        sigwait(&stops, &signal);
        server.stop();
    });
    server.listen_after_bind();                      // returns when the running requests are done
    pthread_kill(stopper.native_handle(), SIGTERM);  // wakes the stopper if no signal has
    stopper.join();
}

}  // namespace

int main(int argc, char **argv) {
    Arguments arguments;
    try {
        arguments = read_arguments(argc, argv);
    } catch (const std::exception &e) {
        std::fprintf(stderr,
                     "%s\nusage: %s BUNDLE [--host 127.0.0.1] [--port 8080] [--workers 2] [--queue 16] [--threads 0]\n",
                     e.what(), argv[0]);
        return 2;
    }
    try {
        serve(arguments);
    } catch (const std::exception &e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
