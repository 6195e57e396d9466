"""The lab: real kernel NAT between network namespaces, captured and cross-checked.

The kernel is the source of truth here: nothing in this package imports nattrace's own idea of NAT. It
never touches the namespace it was started in and leaves nothing behind.
"""
