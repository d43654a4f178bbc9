"""How kernels that Triton compiles are launched, whatever they compute."""
