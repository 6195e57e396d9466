#!/bin/sh
# tcpdump from the folder tcpdump.lib beside this file, with the libraries and the loader that lie there.
here=$(readlink -f "$0" 2> /dev/null) || here=$0
lib=${here%/*}/tcpdump.lib
if [ -e "$lib/ld.so" ]; then
  exec "$lib/ld.so" --library-path "$lib" "$lib/tcpdump" "$@"
fi
exec "$lib/tcpdump" "$@"
