// The safetensors reader and writer on their own.
#include "safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "moba/error.h"
#include "support.h"

namespace moba::cli {
namespace {

// The message that a header with so much data behind it is refused with; "" if it is not.
std::string fault_of(std::string_view header, std::uint64_t data_bytes) {
  try {
    parse_safetensors_header(header, data_bytes);
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

// The same for the bytes of a whole file.
std::string fault_of_file(std::string_view bytes) {
  const TemporaryFolder folder;
  write_bytes(folder.file("x.safetensors"), bytes);
  try {
    const SafetensorsReader reader(folder.file("x.safetensors"));
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

TEST(SafetensorsHeader, ReadsTensorsInTheOrderOfTheirData) {
  const SafetensorsHeader header = parse_safetensors_header(
      "{" + tensor("b", "F32", "[2,3]", "[4,28]") + "," + tensor("a", "BF16", "[2]", "[0,4]") + "}   ", 28);
  ASSERT_EQ(header.tensors.size(), 2u);
  EXPECT_EQ(header.tensors[0].name, "a");
  EXPECT_EQ(header.tensors[0].dtype, "BF16");
  EXPECT_EQ(header.tensors[1].shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(header.tensors[1].begin, 4u);
  EXPECT_EQ(header.tensors[1].end, 28u);
}

TEST(SafetensorsHeader, ReadsScalarsEmptyTensorsAndMetadata) {
  const SafetensorsHeader header = parse_safetensors_header(
      R"({"__metadata__":{"a":"1","b":"\u00e9"},)" + tensor("scalar", "F64", "[]", "[0,8]") + "," +
          tensor("none", "F32", "[0,5]", "[0,0]") + "," + tensor("last", "I8", "[0]", "[8,8]") + "}",
      8);
  EXPECT_EQ(header.tensors.size(), 3u);
  EXPECT_EQ(header.metadata.at("a"), "1");
  EXPECT_EQ(header.metadata.at("b"), "\xc3\xa9");
  EXPECT_TRUE(parse_safetensors_header("{}", 0).tensors.empty());
}

TEST(SafetensorsHeader, KnowsTypesOfLessThanAByte) {
  EXPECT_EQ(fault_of("{" + tensor("x", "F4", "[4]", "[0,2]") + "}", 2), "");
  EXPECT_NE(fault_of("{" + tensor("x", "F4", "[3]", "[0,1]") + "}", 1), "");
}

TEST(SafetensorsHeader, RefusesWhatIsNotJson) {
  for (const char* header : {"", " {}", "[]", "{", "{}}", "{\"a\"", "{\"a\":}", "{,}", "{}x", "{\"a\xff\":{}}"}) {
    EXPECT_NE(fault_of(header, 0), "") << header;
  }
  EXPECT_NE(fault_of(std::string_view("{}\0{}", 5), 0), "");
}

TEST(SafetensorsHeader, RefusesOtherThingsInTheWrongPlace) {
  for (const char* entry : {"null", "true", "1", "-1", "1.5", "\"text\"", "[]"}) {
    EXPECT_NE(fault_of("{\"x\":" + std::string(entry) + "}", 0), "") << entry;
  }
  for (const char* shape : {"null", "3", "[-1]", "[1.0]", "[1e2]", "[\"1\"]", "[[1]]", "[{}]", "[true]",
                            "[9223372036854775808]", "[99999999999999999999999]"}) {
    EXPECT_NE(fault_of("{" + tensor("x", "F32", shape, "[0,4]") + "}", 4), "") << shape;
  }
  for (const char* offsets :
       {"[]", "[0]", "[0,4,4]", "[-1,3]", "[0.0,4]", "{}", "[0,18446744073709551616]", "\"0,4\""}) {
    EXPECT_NE(fault_of("{" + tensor("x", "F32", "[1]", offsets) + "}", 4), "") << offsets;
  }
  EXPECT_NE(fault_of(R"({"x":{"dtype":1,"shape":[1],"data_offsets":[0,4]}})", 4), "");
  EXPECT_NE(fault_of(R"({"x":{"dtype":{},"shape":[1],"data_offsets":[0,4]}})", 4), "");
  EXPECT_NE(fault_of(R"({"__metadata__":{"a":1}})", 0), "");
  EXPECT_NE(fault_of(R"({"__metadata__":{"a":{}}})", 0), "");
  EXPECT_NE(fault_of(R"({"__metadata__":"a"})", 0), "");
}

TEST(SafetensorsHeader, RefusesMissingUnknownAndRepeatedFields) {
  EXPECT_EQ(fault_of(R"({"x":{"dtype":"F32","shape":[1]}})", 4), "tensor 'x': has no data_offsets");
  EXPECT_EQ(fault_of(R"({"x":{"shape":[1],"data_offsets":[0,4]}})", 4), "tensor 'x': has no dtype");
  EXPECT_EQ(fault_of(R"({"x":{}})", 0), "tensor 'x': has no dtype");
  EXPECT_NE(fault_of(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"extra":1}})", 4), "");
  EXPECT_NE(fault_of(R"({"x":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4), "");
  EXPECT_EQ(fault_of("{" + tensor("x", "F32", "[1]", "[0,4]") + "," + tensor("x", "F32", "[1]", "[4,8]") + "}", 8),
            "tensor 'x': is there twice");
  EXPECT_NE(fault_of(R"({"__metadata__":{"a":"1","a":"2"}})", 0), "");
  EXPECT_NE(fault_of(R"({"__metadata__":{},"__metadata__":{}})", 0), "");
}

TEST(SafetensorsHeader, RefusesSizesThatDoNotFit) {
  EXPECT_EQ(fault_of("{" + tensor("x", "F99", "[1]", "[0,4]") + "}", 4), "tensor 'x': dtype 'F99' is unknown");
  EXPECT_NE(fault_of("{" + tensor("x", "F32", "[2]", "[0,4]") + "}", 4), "");
  EXPECT_NE(fault_of("{" + tensor("x", "F32", "[1]", "[0,8]") + "}", 8), "");
  EXPECT_NE(fault_of("{" + tensor("x", "F32", "[1]", "[4,0]") + "}", 4), "");
  // 2^62 * 4 elements of 32 bits: 0 modulo 2^64.
  EXPECT_NE(fault_of("{" + tensor("x", "F32", "[4611686018427387904,4]", "[0,0]") + "}", 0), "");
  EXPECT_NE(fault_of("{" + tensor("x", "U8", "[9223372036854775807,9223372036854775807]", "[0,1]") + "}", 1), "");
}

TEST(SafetensorsHeader, RefusesOverlapsHolesAndWhatIsBeyondTheEnd) {
  const auto two = [](const char* first, const char* second) {
    return "{" + tensor("a", "F32", "[1]", first) + "," + tensor("b", "F32", "[1]", second) + "}";
  };
  EXPECT_EQ(fault_of(two("[0,4]", "[4,8]"), 8), "");
  EXPECT_NE(fault_of(two("[0,4]", "[2,6]"), 6).find("overlap"), std::string::npos);
  EXPECT_NE(fault_of(two("[0,4]", "[0,4]"), 4).find("overlap"), std::string::npos);
  EXPECT_NE(fault_of(two("[0,4]", "[6,10]"), 10).find("a hole"), std::string::npos);
  EXPECT_NE(fault_of(two("[2,6]", "[6,10]"), 10).find("a hole"), std::string::npos);
  EXPECT_NE(fault_of(two("[0,4]", "[4,8]"), 7), "");  // cut short
  EXPECT_NE(fault_of(two("[0,4]", "[4,8]"), 9), "");  // trailing bytes
  EXPECT_NE(fault_of(two("[0,4]", "[18446744073709551612,18446744073709551615]"), 8), "");
  EXPECT_NE(fault_of("{}", 1), "");
}

TEST(SafetensorsHeader, SurvivesDeepNesting) {
  const std::string brackets(1'000'000, '[');
  EXPECT_NE(fault_of("{\"x\":" + brackets, 0), "");
  EXPECT_NE(fault_of("{\"x\":{\"dtype\":\"F32\",\"shape\":" + brackets, 0), "");
  std::string objects;
  for (int i = 0; i < 200'000; ++i) objects += "{\"x\":";
  EXPECT_NE(fault_of(objects, 0), "");
}

TEST(SafetensorsHeader, SurvivesChangedBytes) {
  const std::string header = R"({"__metadata__":{"k":"v"},)" + tensor("a", "F32", "[2,1]", "[0,8]") + "," +
                             tensor("b", "I32", "[1]", "[8,12]") + "}";
  ASSERT_EQ(fault_of(header, 12), "");
  constexpr std::string_view kBytes("{}[]\":,0129.eE-+truefalsn\\ \xff\0", 29);
  std::uint32_t random = 1;
  for (int round = 0; round < 20'000; ++round) {
    std::string changed = header;
    for (int i = 0; i < 1 + round % 3; ++i) {
      random = random * 1664525u + 1013904223u;
      changed[(random >> 8) % changed.size()] = kBytes[(random >> 3) % kBytes.size()];
    }
    fault_of(changed, 12);  // accepted or refused with an Error; anything else ends the test
  }
}

TEST(SafetensorsHeader, MessagesAreShortWhateverTheNames) {
  const std::string name(100'000, 'x');
  EXPECT_LT(fault_of("{" + tensor(name, "F99", "[1]", "[0,4]") + "}", 4).size(), 300u);
  EXPECT_LT(fault_of("{" + tensor("x", name, "[1]", "[0,4]") + "}", 4).size(), 300u);
  EXPECT_EQ(fault_of("{" + tensor("a\\nb", "F99", "[1]", "[0,4]") + "}", 4).find('\n'), std::string::npos);
}

TEST(SafetensorsReader, RefusesFilesThatAreNone) {
  const TemporaryFolder folder;
  EXPECT_THROW(SafetensorsReader(folder.file("nowhere")), Error);
  EXPECT_THROW(SafetensorsReader(folder.path()), Error);
  EXPECT_THROW(SafetensorsReader("/dev/null"), Error);
  EXPECT_NE(fault_of_file(""), "");
  EXPECT_NE(fault_of_file("1234567"), "");
  EXPECT_EQ(fault_of_file(safetensors_bytes("{}", "")), "");
}

TEST(SafetensorsReader, RefusesHeadersLongerThanTheFileOrTheLimit) {
  for (const std::uint64_t length : {std::uint64_t{3}, std::uint64_t{100'000'000}, std::uint64_t{100'000'001},
                                     std::uint64_t{1} << 63, ~std::uint64_t{0}}) {
    std::string bytes(10, '{');
    std::memcpy(bytes.data(), &length, sizeof(length));
    EXPECT_NE(fault_of_file(bytes), "") << length;
  }
}

TEST(SafetensorsReader, EveryCutOfAFileIsRefused) {
  const std::string whole =
      safetensors_bytes("{" + tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "I32", "[1]", "[8,12]") + "}",
                        std::string(12, '\0'));
  EXPECT_EQ(fault_of_file(whole), "");
  for (std::size_t length = 0; length < whole.size(); ++length) {
    EXPECT_NE(fault_of_file(whole.substr(0, length)), "") << length;
  }
}

TEST(SafetensorsReader, NamesTheFile) {
  const TemporaryFolder folder;
  write_bytes(folder.file("x.safetensors"), safetensors_bytes("{}", "more"));
  try {
    const SafetensorsReader reader(folder.file("x.safetensors"));
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).rfind(folder.file("x.safetensors") + ": ", 0), 0u) << error.what();
  }
}

TEST(SafetensorsReader, ReadsDataThatIsNotAligned) {
  // A header of odd length: the floats begin at an odd place.
  std::string header = "{" + tensor("x", "F32", "[3]", "[0,12]") + "}";
  if (header.size() % 2 == 0) header += ' ';
  const float values[] = {1.5f, -2.0f, 3.25f};
  const TemporaryFolder folder;
  write_bytes(folder.file("x"), safetensors_bytes(header, {reinterpret_cast<const char*>(values), sizeof(values)}));
  const SafetensorsReader reader(folder.file("x"));
  const Buffer buffer = reader.read(*reader.find("x"));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % 64, 0u);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(buffer.as<float>()[i], values[i]);
  EXPECT_EQ(reader.find("y"), nullptr);
}

TEST(SafetensorsWriter, WritesWhatTheReaderReads) {
  const TemporaryFolder folder;
  const std::vector<float> floats{1, 2, 3, 4, 5, 6};
  const std::vector<std::uint16_t> halves{0x3c00, 0xbc00};
  const std::vector<std::int32_t> ints{-1, 7, 9};
  write_safetensors(folder.file("x"),
                    {{"floats", ConstTensor(floats.data(), DType::f32, {1, 2, 3})},
                     {"odd \"name\"\n", ConstTensor(halves.data(), DType::bf16, {2})},
                     {"none", ConstTensor(ints.data(), DType::f16, {0, 4})},
                     {"ints", ConstTensor(ints.data(), DType::i32, {3})}},
                    {{"key", "value"}, {"not utf-8", "\xff"}});
  EXPECT_EQ(folder.names(), std::vector<std::string>{"x"});
  const SafetensorsReader reader(folder.file("x"));
  ASSERT_EQ(reader.tensors().size(), 4u);
  EXPECT_EQ(read_floats(reader, "floats"), floats);
  EXPECT_EQ(read_floats(reader, "odd \"name\"\n").size(), 2u);
  EXPECT_EQ(read_ints(reader, "ints"), ints);
  EXPECT_EQ(reader.find("none")->shape, (std::vector<std::int64_t>{0, 4}));
  EXPECT_EQ(reader.metadata().at("key"), "value");

  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, read_bytes(folder.file("x")).data(), sizeof(header_bytes));
  EXPECT_EQ(header_bytes % 8, 0u);
}

TEST(SafetensorsWriter, ReplacesAFileAndLeavesNothingElse) {
  const TemporaryFolder folder;
  const std::vector<std::int32_t> ints{1};
  write_bytes(folder.file("x"), "old");
  write_safetensors(folder.file("x"), {{"a", ConstTensor(ints.data(), DType::i32, {1})}});
  EXPECT_EQ(folder.names(), std::vector<std::string>{"x"});
  EXPECT_EQ(SafetensorsReader(folder.file("x")).tensors().size(), 1u);
  EXPECT_THROW(write_safetensors(folder.file("no/x"), {}), Error);
  EXPECT_THROW(write_safetensors(folder.path(), {}), Error);
  EXPECT_THROW(write_safetensors("", {}), Error);
  EXPECT_EQ(folder.names(), std::vector<std::string>{"x"});
}

}  // namespace
}  // namespace moba::cli
