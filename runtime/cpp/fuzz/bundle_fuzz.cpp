// Fuzzes the readers of manifests and safetensors headers: any input must be read or refused with an Error. The first
// byte selects the reader: 'm' for manifests, 's' for headers behind 8 bytes with the size of the data.
#include <cstring>
#include <string>

#include "error.h"
#include "json.h"
#include "manifest.h"
#include "safetensors.h"
#include "sha256.h"

namespace {

// The text with the right digest, so that the checks behind the digest are reached too.
std::string sealed(std::string_view text) {
    arcflow::Json json = arcflow::read_json(text, "fuzz");
    if (json.is_object()) {
        json.erase("digest");
        json["digest"] = arcflow::sha256(arcflow::canonical(json));
    }
    return json.dump();
}

void read_manifest(std::string_view text) {
    try {
        arcflow::parse_manifest(text, "fuzz");
    } catch (const arcflow::Error &) {
        arcflow::parse_manifest(sealed(text), "fuzz");
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const std::string_view bytes(reinterpret_cast<const char *>(data), size);
    try {
        if (size > 0 && bytes[0] == 'm') {
            read_manifest(bytes.substr(1));
        } else if (size >= 9 && bytes[0] == 's') {
            uint64_t data_bytes = 0;
            std::memcpy(&data_bytes, data + 1, sizeof data_bytes);
            arcflow::parse_safetensors_header(bytes.substr(9), data_bytes, "fuzz");
        }
    } catch (const arcflow::Error &) {
        return 0;  // refused; any other exception ends the run
    }
    return 0;
}
