include(GoogleTest)

# moba_add_gtest(TARGET [PREFIX]): the tests of a GoogleTest program, each a test of ctest called PREFIX and its name. Under a
# sanitizer a process takes half a second to start, longer than most tests run: there ctest runs them in a few shards.
function(moba_add_gtest target)
  set(prefix "${ARGV1}")
  if(NOT MOBA_SANITIZE)
    # Found when ctest runs, not when the build does: a build needs no machine that can run it.
    gtest_discover_tests(${target} TEST_PREFIX "${prefix}" DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 120 NO_PRETTY_VALUES
      PROPERTIES TIMEOUT 300)
    return()
  endif()
  set(shards 12)
  foreach(shard RANGE 1 ${shards})
    math(EXPR index "${shard} - 1")
    add_test(NAME ${prefix}${target}.${shard}of${shards} COMMAND ${target} --gtest_brief=1)
    set_tests_properties(${prefix}${target}.${shard}of${shards} PROPERTIES TIMEOUT 1200
      ENVIRONMENT "GTEST_TOTAL_SHARDS=${shards};GTEST_SHARD_INDEX=${index}")
  endforeach()
endfunction()
