"""Native: a network as C++ that is compiled for this machine."""
