// What the tests of the core share: how an Error is expected, a folder, and manifests.
#pragma once

#include <filesystem>
#include <functional>
#include <string>

#include "check.h"
#include "error.h"
#include "json.h"
#include "manifest.h"

// Name of the manifests' file in errors.
constexpr const char *where = "manifest.json";

// Fails unless `work` throws an Error whose text has this part.
void fails(const std::function<void()> &work, const std::string &part);

void write(const std::filesystem::path &path, const std::string &bytes);

// A folder for one test.
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

// Manifests without their digest, whose files hold "bytes". Qwen's has a baked table in place of the conditioner.
arcflow::Json flux_manifest();
arcflow::Json qwen_manifest();
arcflow::Json file_entry();

// The text of a manifest as a writer would give it, with the digest of its content; and what it is read as.
std::string sealed(arcflow::Json manifest);
arcflow::Manifest parsed(const arcflow::Json &manifest);

void test_bundle();
void test_maths();
void test_request();
