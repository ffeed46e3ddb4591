"""Every pass × every client that a rewritten model meets: what works, and what refuses and why.

`recipes` has the passes and the small models, `clients` what is done in this process, `group` what
needs several, `table` the run and its Markdown. `make interop` writes docs/interop.md.
"""
