// Tokenizers in a build without OpenVINO, which runs them: each prompt is an error that says so.
#include "tokenizer.h"

namespace arcflow {

std::map<std::string, std::unique_ptr<Tokenizer>> open_tokenizers(const Bundle &bundle) {
    std::map<std::string, std::unique_ptr<Tokenizer>> tokenizers;
    for (const auto &[name, file] : bundle.manifest.tokenizers) {
        tokenizers.emplace(name, std::make_unique<UnavailableTokenizer>(
                                     name + ": this library was built without OpenVINO, which reads prompts; build it "
                                            "with -DARCFLOW_OPENVINO=ON"));
    }
    return tokenizers;
}

}  // namespace arcflow
