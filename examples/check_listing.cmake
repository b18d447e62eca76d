# cmake -DREADME=... -DPROGRAM=... -P check_listing.cmake: fails unless the C++ listing of README.md, without its indent of
# four spaces, is PROGRAM without the comment lines that it begins with.
cmake_minimum_required(VERSION 3.25)

file(READ "${README}" text)
string(REGEX REPLACE "^.*\n## From C\\+\\+\n\n" "" text "${text}")
set(listing "")
while(text MATCHES "^(    [^\n]*|)\n")  # a line of the listing, or an empty one
  string(LENGTH "${CMAKE_MATCH_0}" length)
  set(line "${CMAKE_MATCH_1}")
  if(NOT line STREQUAL "")
    string(SUBSTRING "${line}" 4 -1 line)
  endif()
  string(SUBSTRING "${text}" ${length} -1 text)
  string(APPEND listing "${line}\n")
endwhile()
string(REGEX REPLACE "\n+$" "\n" listing "${listing}")

file(READ "${PROGRAM}" program)
string(REGEX REPLACE "^(//[^\n]*\n)+" "" program "${program}")

if(listing STREQUAL "" OR NOT listing STREQUAL program)
  message(FATAL_ERROR "${README} shows a program that is not ${PROGRAM}.\nREADME.md:\n${listing}\nthe program:\n${program}")
endif()
