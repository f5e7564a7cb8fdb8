# find_headers(VARIABLE header DISTRIBUTION name [PATH_SUFFIXES suffix...] [REQUIRED])
#
# The folder that holds a header: asked of the Python package `name` first, because build requirements of a wheel come from
# there, then of the system. The result is the cache variable VARIABLE.
find_package(Python 3.10 COMPONENTS Interpreter REQUIRED)

function(find_headers variable header)
  cmake_parse_arguments(ARG REQUIRED DISTRIBUTION PATH_SUFFIXES ${ARGN})
  if(NOT ${variable})
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import sys
from importlib.metadata import PackageNotFoundError, files
name, header = sys.argv[1:]
try:
    found = [str(f.locate().resolve()) for f in files(name) or [] if ('/' + f.as_posix()).endswith('/' + header)]
except PackageNotFoundError:
    found = []
print(min(found, key=len)[: -len(header) - 1] if found else '', end='')" ${ARG_DISTRIBUTION} ${header}
      OUTPUT_VARIABLE folder)
    find_path(${variable} ${header} HINTS ${folder} PATH_SUFFIXES ${ARG_PATH_SUFFIXES})
    if(${variable})
      message(STATUS "mlff: ${header} in ${${variable}}")
    elseif(ARG_REQUIRED)
      message(FATAL_ERROR "mlff: ${header} was not found; it comes with: pip install ${ARG_DISTRIBUTION}")
    endif()
  endif()
endfunction()
