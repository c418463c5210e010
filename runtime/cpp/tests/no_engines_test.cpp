// A library without any backend checks a bundle, then refuses it with a message that says what to build.
#include "arcflow/arcflow.h"
#include "core_test.h"

int main() {
    const Folder folder;
    const arcflow::Json manifest = flux_manifest();
    for (const auto &file : manifest["files"].items()) write(folder.path() / file.key(), "bytes");
    write(folder.path() / "manifest.json", sealed(manifest));
    arcflow_pipeline *pipeline = nullptr;
    CHECK(std::string(arcflow_backends()).empty());
    CHECK(arcflow_open("no such folder", nullptr, &pipeline) == ARCFLOW_BUNDLE_ERROR);
    CHECK(arcflow_open(folder.path().c_str(), nullptr, &pipeline) == ARCFLOW_ENGINE_ERROR && pipeline == nullptr);
    CHECK(arcflow_last_error() == std::string("this library was built without backends; build it with "
                                              "-DARCFLOW_OPENVINO=ON or -DARCFLOW_TENSORRT=ON"));
    std::puts("ok");
}
