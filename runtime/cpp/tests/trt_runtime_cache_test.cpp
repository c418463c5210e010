// Tests of the cache of TensorRT-RTX, with text in place of kernels.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "trt_runtime_cache.h"

namespace {

using namespace arcflow;
namespace fs = std::filesystem;

const std::vector<std::string> key = {"engine", "1.7.1", "13.0", "RTX"};

struct Folder {
    Folder() {
        char name[] = "/tmp/arcflow_cache_XXXXXX";
        path = mkdtemp(name);
    }
    ~Folder() { fs::remove_all(path); }
    Folder(const Folder &) = delete;
    Folder &operator=(const Folder &) = delete;

    std::set<std::string> endings() const {
        std::set<std::string> found;
        for (const auto &entry : fs::directory_iterator(path)) found.insert(entry.path().extension());
        return found;
    }

    fs::path path;
};

std::string text_of(const fs::path &path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path &path, const std::string &text) { std::ofstream(path, std::ios::binary) << text; }

// Accepts text that begins with "for this GPU: ".
struct FakeKernels : CompiledKernels {
    explicit FakeKernels(int &alive_) : alive(alive_) { ++alive; }
    ~FakeKernels() override { --alive; }
    bool take(std::string_view data) override {
        if (data.rfind("for this GPU: ", 0) != 0) return false;
        kernels = data;
        return true;
    }
    std::string bytes() override { return kernels; }

    std::string kernels;
    int &alive;
};

void test_kept_and_read_again() {
    const Folder folder;
    RuntimeCacheFile file(key, folder.path / "new" / "folder");
    CHECK(!file.read());
    file.write("kernels");
    CHECK(RuntimeCacheFile(key, folder.path / "new" / "folder").read() == "kernels");
    CHECK(!RuntimeCacheFile(key, folder.path / "new" / "folder").read(3));
    for (size_t i = 0; i < key.size(); ++i) {
        std::vector<std::string> other = key;
        other[i] = "other";
        RuntimeCacheFile of_other(other, folder.path / "new" / "folder");
        CHECK(of_other.path != file.path && !of_other.read());
    }
    fs::remove(file.path);
    file.write("kernels");  // the file has this content already
    CHECK(!fs::exists(file.path));
    file.write("more kernels");
    CHECK(text_of(file.path) == "more kernels");
}

void test_damaged_and_foreign_files_are_ignored() {
    const Folder folder;
    const fs::path path = RuntimeCacheFile(key, folder.path).path;
    for (const char *kept : {"", "damaged", "for another GPU: kernels"}) {
        write(path, kept);
        int alive = 0;
        {
            RuntimeCache cache(RuntimeCacheFile(key, folder.path));
            auto made = std::make_unique<FakeKernels>(alive);
            FakeKernels &kernels = *made;
            cache.open(std::move(made));
            CHECK(kernels.kernels.empty());
            cache.save();  // nothing new was compiled
            CHECK(text_of(path) == kept);
            kernels.kernels = "for this GPU: kernels";
            cache.save();
            CHECK(text_of(path) == "for this GPU: kernels");
            cache.close();
            CHECK(alive == 0);
            cache.save();
        }
        RuntimeCache again(RuntimeCacheFile(key, folder.path));
        auto made = std::make_unique<FakeKernels>(alive);
        const FakeKernels &kernels = *made;
        again.open(std::move(made));
        CHECK(kernels.kernels == "for this GPU: kernels");
    }
    CHECK(folder.endings() == (std::set<std::string>{".cache", ".lock"}));
    // A library that makes no cache.
    RuntimeCache none(RuntimeCacheFile(key, folder.path));
    none.open(nullptr);
    none.save();
}

void test_writers_never_mix() {
    const Folder folder;
    std::vector<std::thread> threads;
    const auto text = [](int writer) {
        return std::string(size_t{100000} + static_cast<size_t>(writer), static_cast<char>('a' + writer));
    };
    for (int writer = 0; writer < 8; ++writer) {
        threads.emplace_back([&, writer] {
            for (int i = 0; i < 20; ++i) RuntimeCacheFile(key, folder.path).write(text(writer));
        });
    }
    RuntimeCacheFile file(key, folder.path);
    for (int i = 0; i < 200; ++i) {
        const auto read = file.read();
        CHECK(!read || *read == text(read->front() - 'a'));
    }
    for (std::thread &thread : threads) thread.join();
    CHECK(folder.endings() == (std::set<std::string>{".cache", ".lock"}));
}

void test_what_cannot_be_written_is_no_error() {
    const Folder folder;
    write(folder.path / "file", "");
    RuntimeCacheFile(key, folder.path / "file").write("kernels");
    // Nor is it an error if the file cannot be replaced.
    RuntimeCacheFile file(key, folder.path);
    fs::create_directories(file.path / "inside");
    file.write("kernels");
    CHECK(!file.read() && folder.endings() == (std::set<std::string>{"", ".cache", ".lock"}));
}

}  // namespace

int main() {
    test_kept_and_read_again();
    test_damaged_and_foreign_files_are_ignored();
    test_writers_never_mix();
    test_what_cannot_be_written_is_no_error();
    std::puts("ok");
    return 0;
}
