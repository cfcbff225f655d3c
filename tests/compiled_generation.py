"""Compilation of the steps of `generate`, on a CPU as on a GPU."""

from transformers import CompileConfig


def compile_config() -> tuple[CompileConfig, list]:
    """A `compile_config` for `generate`, and the list to which each graph is appended."""
    graphs: list = []

    def backend(graph, inputs):  # a `CompileCounter` would be copied with the options
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config, graphs
