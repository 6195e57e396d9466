#!/bin/sh
# pack.sh PROGRAM FOLDER: copy a program with all its libraries and its loader (as ld.so) into FOLDER, so that it
# runs on a machine that has none of them. A static program is copied alone.
set -eu
program=$(command -v "$1")
mkdir -p "$2"
cp -L "$program" "$2/"
# glibc: "libpcap.so.0.8 => /lib/... (0x...)" and "/lib64/ld-linux-x86-64.so.2 (0x...)"; musl prints the same.
{ ldd "$program" 2> /dev/null || true; } |
  sed -n -e 's/.*=> \(\/[^ ]*\) .*/\1/p' -e '/=>/!s/^[[:space:]]*\(\/[^ ]*\) .*/\1/p' | while read -r file; do
  case ${file##*/} in
    ld-* | ld.so* | ld64.so*) cp -L "$file" "$2/ld.so" ;;
    *) cp -L "$file" "$2/" ;;
  esac
done
chmod -R a+rX "$2"
