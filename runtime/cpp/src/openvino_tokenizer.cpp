// Runs the tokenizers that `arcflow build --backend openvino` wrote to the bundle's folder `openvino` (rules O1 to O4
// in docs/bundle.md).
#include "tokenizer.h"

#include <dlfcn.h>
#include <cstdlib>
#include <fstream>
#include <mutex>

#include <openvino/openvino.hpp>

#include "constants.h"
#include "error.h"
#include "json.h"
#include "json_text.h"
#include "openvino_error.h"
#include "sha256.h"

namespace arcflow {
namespace {

namespace fs = std::filesystem;

constexpr const char *library_name = "libopenvino_tokenizers.so";
constexpr const char *library_variable = "ARCFLOW_OPENVINO_TOKENIZERS";

Error damaged(const std::string &what) {
    return bundle_error(what + "; run `arcflow build BUNDLE --backend openvino` again");
}

// The folder of the libopenvino that this process has loaded.
fs::path openvino_folder() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void *>(&ov::get_openvino_version), &info) == 0 || info.dli_fname == nullptr)
        return {};
    std::error_code ignored;
    return fs::absolute(info.dli_fname, ignored).parent_path();
}

// The library of openvino-tokenizers: what the environment variable names, or the first that exists: beside
// libopenvino, as in an installed libarcflow and in OpenVINO's archives; in the wheel openvino_tokenizers beside the
// wheel openvino; where CMake found it, if OpenVINO is not installed with libarcflow.
fs::path find_library() {
    if (const char *chosen = std::getenv(library_variable); chosen != nullptr && *chosen != '\0') {
        if (!fs::is_regular_file(chosen)) {
            throw engine_error(std::string(library_variable) + " must name " + library_name + ", got " +
                               json_text(chosen) + "; pip install openvino-tokenizers of OpenVINO's version");
        }
        return fs::absolute(chosen);
    }
    const fs::path folder = openvino_folder();
    const fs::path places[] = {
        folder / library_name,
        folder.parent_path().parent_path() / "openvino_tokenizers" / "lib" / library_name,
#ifdef ARCFLOW_OPENVINO_TOKENIZERS
        ARCFLOW_OPENVINO_TOKENIZERS,
#endif
    };
    std::string tried;
    for (const fs::path &place : places) {
        std::error_code ignored;
        if (fs::is_regular_file(place, ignored)) return place;
        tried += (tried.empty() ? "" : ", ") + place.string();
    }
    throw engine_error(std::string(library_name) + " was not found (tried " + tried +
                       "); pip install openvino-tokenizers of OpenVINO's version, or set " + library_variable);
}

// The ov::Core with the tokenizers' operations: one for each library, never destroyed. Each such core that is destroyed
// leaks 16 KiB of machine code and 1 KiB of heap in OpenVINO 2026.4.
ov::Core &extended_core() {
    static std::mutex mutex;
    static auto &cores = *new std::map<fs::path, std::unique_ptr<ov::Core>>;
    const fs::path library = find_library();
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<ov::Core> &kept = cores[library];
    if (kept) return *kept;
    auto core = std::make_unique<ov::Core>();
    try {
        core->add_extension(library);
    } catch (const ov::Exception &e) {
        throw engine_error("OpenVINO cannot load " + library.string() + ": " + useful_line(e) +
                           "; pip install openvino-tokenizers of OpenVINO's version, or set " + library_variable);
    }
    kept = std::move(core);
    return *kept;
}

// True for valid UTF-8 (RFC 3629: no overlong forms, no surrogates).
bool is_utf8(const std::string &text) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
    for (size_t i = 0; i < text.size();) {
        const unsigned lead = byte(i);
        const size_t more = lead < 0x80 ? 0 : lead >= 0xc2 && lead < 0xe0 ? 1 : (lead & 0xf0) == 0xe0 ? 2 : 3;
        if (more == 3 && (lead < 0xf0 || lead > 0xf4)) return false;
        if (text.size() - i <= more) return false;
        for (size_t k = 1; k <= more; ++k)
            if ((byte(i + k) & 0xc0) != 0x80) return false;
        if ((lead == 0xe0 && byte(i + 1) < 0xa0) || (lead == 0xed && byte(i + 1) > 0x9f) ||
            (lead == 0xf0 && byte(i + 1) < 0x90) || (lead == 0xf4 && byte(i + 1) > 0x8f)) {
            return false;
        }
        i += more + 1;
    }
    return true;
}

class OpenVinoTokenizer : public Tokenizer {
public:
    OpenVinoTokenizer(std::string name, ov::CompiledModel model)
        : name_(std::move(name)), model_(std::move(model)), request_(model_.create_infer_request()) {}

    std::vector<int64_t> ids(const std::string &text) override {
        if (!is_utf8(text)) throw request_error("a prompt must be UTF-8; encode the text as UTF-8");
        // One call at a time: some of the tokenizers' operations initialise themselves without a lock.
        const std::lock_guard<std::mutex> lock(mutex_);
        try {
            ov::Tensor input(ov::element::string, ov::Shape{1});
            input.data<std::string>()[0] = text;
            request_.set_input_tensor(input);
            request_.infer();
            const ov::Tensor found = request_.get_output_tensor();
            const int32_t *first = found.data<const int32_t>();
            return {first, first + found.get_size()};
        } catch (const ov::Exception &e) {
            throw engine_error(name_ + ": OpenVINO failed to tokenise a prompt: " + useful_line(e));
        }
    }

private:
    std::string name_;
    std::mutex mutex_;
    ov::CompiledModel model_;
    ov::InferRequest request_;
};

struct ModelFile {
    fs::path path;
    uint64_t bytes;
    std::string sha256;
};

// Read a file's entry in the record and check the file against it (O4).
ModelFile read_file(const Place &place, const fs::path &folder) {
    place.keys({"file", "bytes", "sha256"});
    const std::string name = place["file"].text();
    const bool plain = !name.empty() && name != "." && name != ".." && name.find('/') == name.npos &&
                       name.find('\\') == name.npos && name.find('\0') == name.npos;
    if (!plain) throw damaged(place.where() + ": file must be a name without a folder, got " + json_text(name));
    const ModelFile file{folder / name, static_cast<uint64_t>(place["bytes"].integer()), place["sha256"].text()};
    std::error_code error;
    if (fs::symlink_status(file.path, error).type() != fs::file_type::regular)
        throw damaged(file.path.string() + " is missing");
    const auto size = fs::file_size(file.path, error);
    if (error || size != file.bytes) {
        throw damaged(file.path.string() + " must have " + std::to_string(file.bytes) + " bytes, got " +
                      std::to_string(size) + "; it was cut or swapped");
    }
    if (sha256_file(file.path) != file.sha256)
        throw damaged(file.path.string() + " does not match its SHA-256; it was edited or swapped");
    return file;
}

std::vector<int64_t> read_ids(const Place &place) {
    std::vector<int64_t> ids;
    place.each_item([&](const Place &item) { ids.push_back(item.integer()); });
    return ids;
}

std::string read_text(const fs::path &path) {
    std::error_code error;
    const auto size = fs::file_size(path, error);
    if (error || size > max_record_bytes) {
        throw damaged(path.string() + " is larger than " + std::to_string(max_record_bytes) +
                      " bytes; it is not a record");
    }
    std::ifstream file(path, std::ios::binary);
    std::string text(static_cast<size_t>(size), '\0');
    if (!file.read(text.data(), static_cast<std::streamsize>(size))) throw damaged(path.string() + " cannot be read");
    return text;
}

// Read the record and check its format, version and digest (O2).
Json read_record(const fs::path &path) {
    Json record = read_json(read_text(path), path.string());
    if (!record.is_object() || record.value("format", Json()) != tokenizers_format) {
        throw damaged(path.string() + ": format must be " + json_text(tokenizers_format) +
                      "; this is not a record of tokenizers");
    }
    if (record.value("version", Json()) != tokenizers_version) {
        throw damaged(path.string() + ": version must be " + std::to_string(tokenizers_version) + ", got " +
                      message_text(record.value("version", Json())));
    }
    const Json digest = record.value("digest", Json());
    record.erase("digest");
    if (digest != sha256(canonical(record)))
        throw damaged(path.string() + " does not match its own digest; it was edited");
    return record;
}

}  // namespace

std::map<std::string, std::unique_ptr<Tokenizer>> open_tokenizers(const Bundle &bundle) {
    std::map<std::string, std::unique_ptr<Tokenizer>> tokenizers;
    const fs::path folder = bundle.root / tokenizers_folder;
    const fs::path path = folder / tokenizers_record;
    std::error_code error;
    if (!fs::exists(fs::symlink_status(path, error))) return tokenizers;
    if (fs::is_symlink(folder, error) || fs::is_symlink(path, error))
        throw damaged(path.string() + " must be a file of the bundle, not a link");
    const Json json = read_record(path);
    const Place record(json, path.string());
    record.keys({"format", "version", "tokenizers", "converter", "openvino", "openvino_tokenizers", "created"});
    for (const char *text : {"openvino", "openvino_tokenizers", "created"}) record[text].text();
    record["converter"].integer();

    ov::Core *core = nullptr;
    std::string unavailable;
    try {
        core = &extended_core();
    } catch (const Error &e) {
        unavailable = e.what();
    }
    record["tokenizers"].each_entry([&](const std::string &name, const Place &place) {
        place.keys({"source", "graph", "weights", "prefix", "suffix"});
        const auto said = bundle.manifest.tokenizers.find(name);
        if (said == bundle.manifest.tokenizers.end() ||
            bundle.manifest.files.at(said->second).sha256 != place["source"].text()) {
            throw damaged(path.string() + ": " + name + " was built from another tokenizer than the bundle's");
        }
        const ModelFile graph = read_file(place["graph"], folder), weights = read_file(place["weights"], folder);
        const std::vector<int64_t> prefix = read_ids(place["prefix"]), suffix = read_ids(place["suffix"]);
        if (!unavailable.empty()) {
            tokenizers.emplace(name, std::make_unique<UnavailableTokenizer>(name + ": " + unavailable));
            return;
        }
        try {
            const auto model = core->read_model(graph.path, weights.path);
            if (model->inputs().size() != 1 || model->outputs().size() != 1 ||
                model->input().get_element_type() != ov::element::string ||
                model->output().get_element_type() != ov::element::i32) {
                throw damaged(graph.path.string() + " must map a text to ids");
            }
            auto tokenizer = std::make_unique<OpenVinoTokenizer>(
                name, core->compile_model(model, "CPU", ov::inference_num_threads(1), ov::num_streams(1),
                                          ov::hint::enable_cpu_pinning(false)));
            tokenizer->prefix = prefix;
            tokenizer->suffix = suffix;
            tokenizers.emplace(name, std::move(tokenizer));
        } catch (const ov::Exception &e) {
            throw engine_error(name + ": OpenVINO cannot load " + graph.path.string() + ": " + useful_line(e) +
                               "; run `arcflow build BUNDLE --backend openvino` again, with this version of OpenVINO");
        }
    });
    for (const auto &[name, file] : bundle.manifest.tokenizers)
        if (tokenizers.find(name) == tokenizers.end()) throw damaged(path.string() + ": " + name + " was not built");
    return tokenizers;
}

}  // namespace arcflow
