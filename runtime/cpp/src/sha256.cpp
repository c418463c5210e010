// Computes SHA-256 with libcrypto.
#include "sha256.h"

#include <openssl/evp.h>

#include <array>
#include <cstdio>
#include <memory>
#include <vector>

#include "error.h"

namespace arcflow {
namespace {

constexpr size_t block_bytes = size_t{4} << 20;

class Digest {
public:
    Digest() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
        check(context_ != nullptr && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
    }

    void add(const void *bytes, size_t count) { check(EVP_DigestUpdate(context_.get(), bytes, count) == 1); }

    std::string hex() {
        std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
        unsigned int size = 0;
        check(EVP_DigestFinal_ex(context_.get(), digest.data(), &size) == 1);
        std::string text;
        for (unsigned int i = 0; i < size; ++i) {
            text += "0123456789abcdef"[digest[i] >> 4];
            text += "0123456789abcdef"[digest[i] & 15];
        }
        return text;
    }

private:
    static void check(bool ok) {
        if (!ok) throw Error(ARCFLOW_INTERNAL_ERROR, "libcrypto cannot compute SHA-256 on this machine");
    }

    std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace

std::string sha256(std::string_view bytes) {
    Digest digest;
    digest.add(bytes.data(), bytes.size());
    return digest.hex();
}

std::string sha256_file(const std::filesystem::path &path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    Digest digest;
    std::vector<char> block(block_bytes);
    if (file)
        while (const size_t count = std::fread(block.data(), 1, block.size(), file.get()))
            digest.add(block.data(), count);
    if (!file || std::ferror(file.get())) throw bundle_error(path.string() + " cannot be read; check its permissions");
    return digest.hex();
}

}  // namespace arcflow
