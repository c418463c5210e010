// Reads the records of built engines, and selects and checks the engine for this machine.
#include "trt_record.h"

#include <sys/utsname.h>

#include <algorithm>
#include <cctype>
#include <fstream>
#include <functional>
#include <iterator>
#include <set>

#include "constants.h"
#include "error.h"
#include "json.h"
#include "json_text.h"
#include "sha256.h"

namespace arcflow {
namespace {

namespace fs = std::filesystem;

constexpr const char *again = "build the engine again with `arcflow build`";

std::string read_text(const fs::path &path) {
    std::ifstream file(path, std::ios::binary);
    std::string text(max_record_bytes + 1, '\0');
    file.read(text.data(), static_cast<std::streamsize>(text.size()));
    if (!file.is_open() || file.bad()) throw engine_error(path.string() + " cannot be read; check its permissions");
    text.resize(static_cast<size_t>(file.gcount()));
    if (text.size() > max_record_bytes) {
        throw engine_error(path.string() + " is larger than " + std::to_string(max_record_bytes) +
                           " bytes; it is not an engine's record");
    }
    return text;
}

std::vector<int64_t> sizes(const Place &place) {
    std::vector<int64_t> found;
    place.each_item([&](const Place &item) { found.push_back(item.integer()); });
    return found;
}

ProfileShapes parse_shapes(const Place &place) {
    place.keys({"min", "opt", "max"});
    return {sizes(place["min"]), sizes(place["opt"]), sizes(place["max"])};
}

std::optional<int64_t> optional_integer(const Place &place) {
    return place.is_null() ? std::nullopt : std::optional(place.integer("an integer of at least 0, or null"));
}

EngineKey parse_key(const Place &place) {
    place.keys({"part", "graph", "weights", "precision", "profiles", "flags", "optimization_level", "workspace_bytes",
                "builder", "builder_version", "target", "gpu", "platform"});
    EngineKey key;
    key.part = place["part"].text();
    key.graph = place["graph"].text();
    key.weights = place["weights"].text();
    key.precision = place["precision"].one_of({"float32", "float16", "bfloat16", "int64", "uint8"});
    place["profiles"].each_item([&](const Place &item) {
        auto &profile = key.profiles.emplace_back();
        item.each_entry(
            [&](const std::string &name, const Place &shapes) { profile.emplace(name, parse_shapes(shapes)); });
    });
    place["flags"].each_item([&](const Place &item) { key.flags.push_back(item.text()); });
    key.optimization_level = optional_integer(place["optimization_level"]);
    key.workspace_bytes = optional_integer(place["workspace_bytes"]);
    key.builder = place["builder"].text();
    key.builder_version = place["builder_version"].text();
    key.target = place["target"].text();
    if (!place["gpu"].is_null()) key.gpu = place["gpu"].text("a string or null");
    key.platform = place["platform"].text();
    return key;
}

EngineRecord parse_record(const Json &json, const std::string &where) {
    const Place place(json, where);
    EngineRecord record;
    if (place["version"].integer() == 1) {
        place.keys({"format", "version", "file", "bytes", "sha256", "key", "created", "build_seconds"});
    } else {
        place.keys({"format", "version", "file", "bytes", "sha256", "key", "created", "build_seconds",
                    "activation_bytes", "allocates_when_run"});
        if (!place["activation_bytes"].is_null()) record.activation_bytes = sizes(place["activation_bytes"]);
        record.allocates_when_run = place["allocates_when_run"].boolean();
    }
    record.file = place["file"].text();
    record.bytes = static_cast<uint64_t>(place["bytes"].integer());
    record.sha256 = place["sha256"].text();
    record.key = parse_key(place["key"]);
    place["created"].text();
    place["build_seconds"].real();
    return record;
}

std::string build_advice(const Bundle &bundle, const std::string &part, const Host &host) {
    const std::string target = host.builder == "tensorrt" ? "" : " --target " + host.target;
    return "run: arcflow build " + bundle.root.string() + " --backend " + host.builder + target + " --parts " + part;
}

struct Candidate {
    fs::path path;
    EngineRecord record;
};

std::vector<Candidate> read_records(const Bundle &bundle) {
    const fs::path folder = bundle.root / engines_folder;
    std::vector<fs::path> paths;
    std::error_code none;
    for (fs::directory_iterator entry(folder, none), end; !none && entry != end; entry.increment(none))
        if (entry->path().extension() == ".json") paths.push_back(entry->path());
    std::sort(paths.begin(), paths.end());
    std::vector<Candidate> found;
    for (const fs::path &path : paths) found.push_back({path, read_record(path)});
    return found;
}

// Keep the candidates whose `of` equals `wanted` and return true; if there are none, change nothing and return false.
bool keep(std::vector<Candidate> &candidates, const std::string &wanted,
          const std::function<std::string(const EngineKey &)> &of) {
    std::vector<Candidate> fitting;
    for (const Candidate &c : candidates)
        if (of(c.record.key) == wanted) fitting.push_back(c);
    if (fitting.empty()) return false;
    candidates = std::move(fitting);
    return true;
}

std::string gpu_text(const std::optional<std::string> &gpu) { return gpu ? *gpu : "none"; }

}  // namespace

std::string this_platform() {
    utsname name;
    if (uname(&name) != 0) throw Error(ARCFLOW_INTERNAL_ERROR, "the operating system does not tell its name");
    std::string text = std::string(name.sysname) + "-" + name.machine;
    for (char &c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return text;
}

EngineRecord read_record(const fs::path &path) {
    const std::string where = path.string();
    const std::string text = read_text(path);
    Json json, digest;
    EngineRecord record;
    try {
        json = read_json(text, where);
        if (!json.is_object() || json.value("format", Json()) != engine_format) {
            throw engine_error(where + ": format must be " + json_text(engine_format) +
                               "; this is not an engine's record, remove it");
        }
        const Json version = json.value("version", Json());
        if (!version.is_number_integer() || version < 1 || version > engine_version) {
            throw engine_error(where + ": version must be 1 or " + std::to_string(engine_version) + ", got " +
                               message_text(version) + "; " + again);
        }
        digest = json.value("digest", Json());
        json.erase("digest");
        record = parse_record(json, where);
    } catch (const FormatError &e) {
        throw engine_error(std::string(e.what()) + "; " + again);
    }
    if (!digest.is_string() || digest != sha256(canonical(json)))
        throw engine_error(where + " does not match its own digest; it was edited, " + again);
    // A NUL would cut the name when the file is opened.
    const bool beside = record.file.find_first_of(std::string("/\0", 2)) == std::string::npos;
    if (!beside || record.file.empty() || record.file == "." || record.file == "..") {
        throw engine_error(where + ": file must be a name without a folder, got " + json_text(record.file) + "; " +
                           again);
    }
    return record;
}

BuiltEngine find_engine(const Bundle &bundle, const std::string &part, const Host &host) {
    std::vector<Candidate> found;
    for (Candidate &c : read_records(bundle))
        if (c.record.key.part == part) found.push_back(std::move(c));
    const std::string build = build_advice(bundle, part, host);
    if (found.empty()) throw engine_error(bundle.root.string() + " has no engine for " + part + "; " + build);
    struct Field {
        const char *what;
        std::string wanted;
        std::function<std::string(const EngineKey &)> of;
    };
    const Field machine[] = {
        {"library", host.builder, [](const EngineKey &k) { return k.builder; }},
        {"library's version", host.builder_version, [](const EngineKey &k) { return k.builder_version; }},
        {"compute capability", host.target, [](const EngineKey &k) { return k.target; }},
        {"GPU", gpu_text(host.gpu), [](const EngineKey &k) { return gpu_text(k.gpu); }},
        {"platform", host.platform, [](const EngineKey &k) { return k.platform; }},
    };
    for (const Field &field : machine) {
        if (keep(found, field.wanted, field.of)) continue;
        std::set<std::string> values;
        for (const Candidate &c : found) values.insert(field.of(c.record.key));
        std::string have;
        for (const std::string &value : values) have += (have.empty() ? "" : ", ") + value;
        throw engine_error(part + ": the engine's " + field.what + " must be " + field.wanted + ", got " + have + "; " +
                           build);
    }
    const Part &spec = bundle.manifest.parts.at(part);
    const auto &files = bundle.manifest.files;
    const Field bundle_fields[] = {
        {"graph", files.at(spec.graph).sha256, [](const EngineKey &k) { return k.graph; }},
        {"weights", files.at(spec.weights).sha256, [](const EngineKey &k) { return k.weights; }},
        {"precision", name_of(spec.precision), [](const EngineKey &k) { return k.precision; }},
    };
    for (const Field &field : bundle_fields) {
        if (keep(found, field.wanted, field.of)) continue;
        throw engine_error(found[0].path.string() + ": the engine of " + part + " was built from another " +
                           field.what + " than the bundle's; " + build);
    }
    return {found[0].path.parent_path() / found[0].record.file, found[0].record};
}

void check_engine(const BuiltEngine &engine, bool full) {
    const EngineRecord &record = engine.record;
    const std::string what = engine.path.string() + ", the " + record.key.builder + " engine of " + record.key.part +
                             " for " + record.key.target + ",";
    const std::string build = "build it again with `arcflow build`";
    std::error_code none;
    if (fs::is_symlink(engine.path, none) || !fs::is_regular_file(engine.path, none))
        throw engine_error(what + " is missing; " + build);
    const uint64_t size = fs::file_size(engine.path, none);
    if (none || size != record.bytes) {
        throw engine_error(what + " must have " + std::to_string(record.bytes) + " bytes, got " + std::to_string(size) +
                           "; it was cut or swapped, " + build);
    }
    if ((full || size <= fast_hash_bytes) && sha256_file(engine.path) != record.sha256)
        throw engine_error(what + " does not match its SHA-256; it was edited or swapped, " + build);
}

}  // namespace arcflow
