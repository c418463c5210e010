// Shared by the tests of the core: expected errors, a temporary folder, manifests.
#pragma once

#include <filesystem>
#include <functional>
#include <string>

#include "check.h"
#include "error.h"
#include "json.h"
#include "manifest.h"

// The manifest's file name in errors.
constexpr const char *where = "manifest.json";

// Fails unless `work` throws an Error whose text contains `part`.
void fails(const std::function<void()> &work, const std::string &part);

void write(const std::filesystem::path &path, const std::string &bytes);

// A temporary folder.
class Folder {
public:
    Folder();
    Folder(const Folder &) = delete;
    Folder &operator=(const Folder &) = delete;
    ~Folder();
    const std::filesystem::path &path() const { return path_; }

private:
    std::filesystem::path path_;
};

// Manifests without a digest, whose files contain "bytes". Qwen's has a baked table and no conditioner.
arcflow::Json flux_manifest();
arcflow::Json qwen_manifest();
arcflow::Json straight_manifest();  // Qwen's, of a straight student with guidance of scale 4 (B16)
arcflow::Json file_entry();

// `sealed`: a manifest's text with its digest. `parsed`: that text, read by the library.
std::string sealed(arcflow::Json manifest);
arcflow::Manifest parsed(const arcflow::Json &manifest);

void test_bundle();
void test_maths();
void test_request();
void test_negative_prompts();
