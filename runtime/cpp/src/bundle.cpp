// Opens a bundle: checks the manifest and the files that it lists.
#include <algorithm>
#include <cstdio>
#include <memory>

#include "constants.h"
#include "error.h"
#include "json_text.h"
#include "manifest.h"
#include "rules.h"
#include "sha256.h"

namespace arcflow {
namespace {

namespace fs = std::filesystem;

std::string read_manifest(const fs::path &root, const fs::path &path) {
    std::error_code ignored;  // an entry that cannot be examined counts as absent
    if (!fs::is_directory(root, ignored))
        throw bundle_error(root.string() + " is not a directory; give the directory that `arcflow export --out` wrote");
    if (!fs::is_regular_file(path, ignored)) {
        throw bundle_error(root.string() + " has no " + manifest_name +
                           ", so it is not a bundle; make one with `arcflow export`");
    }
    const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    std::string text, block(size_t{64} << 10, '\0');
    if (file) {
        // One byte above the limit is enough for parse_manifest to refuse the text.
        while (text.size() <= max_manifest_bytes) {
            const size_t count = std::fread(block.data(), 1, block.size(), file.get());
            if (count == 0) break;
            text.append(block, 0, count);
        }
    }
    if (!file || std::ferror(file.get())) throw bundle_error(path.string() + " cannot be read; check its permissions");
    return text;
}

// True if `path`, with all links followed, lies inside `root`, whose own path has no links.
bool is_inside(const fs::path &path, const fs::path &root) {
    const fs::path target = fs::canonical(path);
    return std::mismatch(root.begin(), root.end(), target.begin(), target.end()).first == root.end();
}

// Check rules B4 and B6 for one file.
void check_file(const Bundle &bundle, const fs::path &canonical_root, const std::string &name, bool full) {
    const FileEntry &entry = bundle.manifest.files.at(name);
    const fs::path path = bundle.path(name);
    std::error_code ignored;
    if (!fs::is_regular_file(path, ignored))
        throw bundle_error(path.string() + " is missing; was the bundle moved in part? Copy the whole directory again");
    if (!is_inside(path, canonical_root))
        throw bundle_error(path.string() + " is a link that leaves the bundle; copy the file into it");
    const uint64_t size = fs::file_size(path);
    if (size != entry.bytes) {
        throw bundle_error(path.string() + " must have " + std::to_string(entry.bytes) + " bytes, got " +
                           std::to_string(size) + "; it was cut or edited, export or copy it again");
    }
    if ((full || size <= fast_hash_bytes) && sha256_file(path) != entry.sha256) {
        throw bundle_error(path.string() + " does not match its SHA-256 in " + manifest_name +
                           "; it was edited or damaged, export or copy it again");
    }
}

}  // namespace

Bundle Bundle::open(const fs::path &given, bool full) {
    std::error_code unknown;
    fs::path root = fs::absolute(given, unknown);
    if (unknown) root = given;  // the working directory no longer exists
    const fs::path path = root / manifest_name;
    const std::string text = read_manifest(root, path);
    Bundle bundle{root, parse_manifest(text, path.string()), sha256(text)};
    try {
        const fs::path canonical_root = fs::canonical(root);
        for (const auto &[name, entry] : bundle.manifest.files) check_file(bundle, canonical_root, name, full);
    } catch (const fs::filesystem_error &e) {
        throw bundle_error(root.string() + " cannot be read (" + e.what() + "); check its permissions");
    }
    return bundle;
}

void Bundle::check_unchanged() const {
    if (manifest_sha256.empty()) return;
    bool unchanged = false;
    try {
        unchanged = sha256(read_manifest(root, root / manifest_name)) == manifest_sha256;
    } catch (const Error &) {  // it was removed
    }
    if (!unchanged) throw bundle_error(root.string() + " was replaced or removed since it was opened; load it again");
}

fs::path Bundle::path(const std::string &name) const {
    if (manifest.files.count(name) == 0) {
        throw bundle_error((root / manifest_name).string() + ": " + json_text(name) +
                           " is used but not listed under \"files\"");
    }
    return root / name;
}

}  // namespace arcflow
