"""What goes into a module and comes out of it."""

from __future__ import annotations

from contextlib import contextmanager


@contextmanager
def hooked(model, name, hook):
    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def inputs_of(model, name):
    seen = []
    with hooked(model, name, lambda module, inputs, output: seen.append(inputs[0])):
        yield seen


@contextmanager
def outputs_of(model, name):
    seen = []
    with hooked(model, name, lambda module, inputs, output: seen.append(first(output))):
        yield seen


def first(output):
    return output[0] if isinstance(output, tuple) else output
