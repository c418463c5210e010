# The backend that runs engines with OpenVINO on a CPU, and the tokenizers of openvino-tokenizers.
find_package(OpenVINO REQUIRED COMPONENTS Runtime HINTS ${openvino_dir}/cmake)
arcflow_python_package(openvino_tokenizers openvino_tokenizers_dir)
find_library(ARCFLOW_OPENVINO_TOKENIZERS openvino_tokenizers HINTS ${openvino_tokenizers_dir}/lib
             DOC "Library of openvino-tokenizers")
if(NOT ARCFLOW_OPENVINO_TOKENIZERS)
    message(WARNING "openvino-tokenizers was not found, so requests must give token ids instead of prompts; "
                    "pip install openvino-tokenizers, or set ARCFLOW_OPENVINO_TOKENIZERS")
endif()
target_sources(arcflow_engines PRIVATE src/openvino_backend.cpp src/openvino_int8.cpp src/openvino_tokenizer.cpp)
target_compile_definitions(arcflow_engines PUBLIC ARCFLOW_WITH_OPENVINO)
target_link_libraries(arcflow_engines PUBLIC openvino::runtime)
target_link_libraries(arcflow PRIVATE openvino::runtime)
# OpenVINO's headers put __FILE__ into messages; no folder of this machine should be in the library.
get_target_property(openvino_headers openvino::runtime INTERFACE_INCLUDE_DIRECTORIES)
foreach(folder IN LISTS openvino_headers)
    target_compile_options(arcflow_engines PRIVATE -fmacro-prefix-map=${folder}/=)
endforeach()

# An installed library that has OpenVINO beside it must not look in folders of this machine.
if(ARCFLOW_OPENVINO_TOKENIZERS AND NOT ARCFLOW_INSTALL_OPENVINO)
    target_compile_definitions(arcflow_engines PUBLIC ARCFLOW_OPENVINO_TOKENIZERS="${ARCFLOW_OPENVINO_TOKENIZERS}")
endif()
