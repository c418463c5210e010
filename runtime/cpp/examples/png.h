// RGB pixels -> a PNG file's bytes, without compression, which every viewer reads. Use libpng for smaller files.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace png {

inline void append_u32(std::string &out, std::uint32_t value) {
    for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>((value >> shift) & 0xFFu);
}

// CRC-32 of ISO 3309, which ends each chunk.
inline std::uint32_t crc32(const std::string &data) {
    static const auto table = [] {
        std::array<std::uint32_t, 256> made{};
        for (std::uint32_t i = 0; i < 256; ++i) {
            made[i] = i;
            for (int bit = 0; bit < 8; ++bit) made[i] = (made[i] >> 1) ^ ((made[i] & 1u) != 0 ? 0xEDB88320u : 0u);
        }
        return made;
    }();
    std::uint32_t crc = 0xFFFFFFFFu;
    for (const char c : data) crc = table[(crc ^ static_cast<unsigned char>(c)) & 0xFFu] ^ (crc >> 8);
    return ~crc;
}

// Checksum of RFC 1950, which ends the zlib stream.
inline std::uint32_t adler32(const std::string &data) {
    std::uint32_t a = 1, b = 0;
    for (const char c : data) {
        a = (a + static_cast<unsigned char>(c)) % 65521;
        b = (b + a) % 65521;
    }
    return b << 16 | a;
}

inline void append_chunk(std::string &out, const std::string &type, const std::string &data) {
    append_u32(out, static_cast<std::uint32_t>(data.size()));
    out += type + data;
    append_u32(out, crc32(type + data));
}

// `rgb` holds height rows of 3 * width bytes.
inline std::string encode(const std::uint8_t *rgb, int width, int height) {
    std::string rows;
    const std::size_t row = 3 * static_cast<std::size_t>(width);
    for (int y = 0; y < height; ++y) {
        rows += '\0';  // no filter
        rows.append(reinterpret_cast<const char *>(rgb) + static_cast<std::size_t>(y) * row, row);
    }
    std::string stream("\x78\x01", 2);
    constexpr std::size_t largest = 65535;  // of a stored block of RFC 1951
    for (std::size_t i = 0; i < rows.size(); i += largest) {
        const std::size_t size = std::min(largest, rows.size() - i);
        stream += static_cast<char>(i + size == rows.size());
        for (const std::size_t value : {size, ~size})
            stream += {static_cast<char>(value & 0xFFu), static_cast<char>((value >> 8) & 0xFFu)};
        stream.append(rows, i, size);
    }
    append_u32(stream, adler32(rows));

    std::string header;
    append_u32(header, static_cast<std::uint32_t>(width));
    append_u32(header, static_cast<std::uint32_t>(height));
    header += std::string("\x08\x02\0\0\0", 5);  // 8 bits, RGB
    std::string out("\x89PNG\r\n\x1A\n", 8);
    append_chunk(out, "IHDR", header);
    append_chunk(out, "IDAT", stream);
    append_chunk(out, "IEND", "");
    return out;
}

}  // namespace png
