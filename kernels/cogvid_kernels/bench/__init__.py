"""The benchmark of the kernels: `python -m cogvid_kernels.bench`. kernels/README.md has an example.

It is a program, not a part of the kernels: it may import cogvid, whose `cogvid.ops` is what every provider is checked
against, and nothing else in cogvid_kernels imports it. Packages such as diffusers or flash-attn are used where they are
installed and reported where they are not.

    cases      shapes, and inputs as the models pass them; inputs of a real run
    registry   the operations and who computes them
    providers  the code of others
    own        functions given by `--provider`
    timing     the check against the reference, the clock, the limits of the machine
    history    results over time, and what became slower
    plots      pictures
    command    the command line
"""
