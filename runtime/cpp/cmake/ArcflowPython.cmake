# arcflow_python_package(<name> <variable>): the folder of a package that ARCFLOW_PYTHON would import, or "".
function(arcflow_python_package name variable)
    string(CONCAT find "import importlib.util; s = importlib.util.find_spec('${name}'); "
                       "print(s.submodule_search_locations[0] if s else '')")
    execute_process(COMMAND ${ARCFLOW_PYTHON} -c "${find}" OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE
                    ERROR_QUIET RESULT_VARIABLE failed)
    if(failed)
        set(folder "")
    endif()
    set(${variable} "${folder}" PARENT_SCOPE)
endfunction()
