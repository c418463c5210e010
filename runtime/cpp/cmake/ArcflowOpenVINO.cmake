# Engines of OpenVINO, and the tokenizers of openvino-tokenizers where they are found.
find_package(OpenVINO REQUIRED COMPONENTS Runtime HINTS ${openvino_dir}/cmake)
arcflow_python_package(openvino_tokenizers openvino_tokenizers_dir)
find_library(ARCFLOW_OPENVINO_TOKENIZERS openvino_tokenizers HINTS ${openvino_tokenizers_dir}/lib
             DOC "Library of openvino-tokenizers")
if(NOT ARCFLOW_OPENVINO_TOKENIZERS)
    message(WARNING "openvino-tokenizers was not found, so only token ids can be drawn; "
                    "pip install openvino-tokenizers, or set ARCFLOW_OPENVINO_TOKENIZERS")
endif()
target_sources(arcflow_engines PRIVATE src/openvino_backend.cpp src/openvino_tokenizer.cpp)
target_compile_definitions(arcflow_engines PUBLIC ARCFLOW_WITH_OPENVINO
    $<$<BOOL:${ARCFLOW_OPENVINO_TOKENIZERS}>:ARCFLOW_OPENVINO_TOKENIZERS="${ARCFLOW_OPENVINO_TOKENIZERS}">)
target_link_libraries(arcflow_engines PUBLIC openvino::runtime)
target_link_libraries(arcflow PRIVATE openvino::runtime)
