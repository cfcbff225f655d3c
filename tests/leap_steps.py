"""Which tokens of LEAP go through all layers in one call of C."""

from modeling_heptapod.leap import leap_step, modeling_leap


def watch_steps(monkeypatch):
    """A list that grows by a bool for each forward pass of a single token: whether it went through C."""
    calls, taken = [], []
    step, through_layers = leap_step._step, modeling_leap.LeapModel._through_layers

    def step_spy(*arguments):
        out = step(*arguments)
        if out is not None:
            calls.append(True)
        return out

    def layers_spy(model, hidden_states, rotary, context, cache):
        before = len(calls)
        out = through_layers(model, hidden_states, rotary, context, cache)
        if context.single_step:
            taken.append(len(calls) > before)
        return out

    monkeypatch.setattr(leap_step, "_step", step_spy)
    monkeypatch.setattr(modeling_leap.LeapModel, "_through_layers", layers_spy)
    return taken
