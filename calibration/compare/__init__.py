"""Other ways to store keys and values, and ours, judged alike: `peers` lists them, `harness` judges, `plots` draws.

Every peer is an emulation in plain torch of what its source describes, tested against a second formulation
(`tests/compare`). Its bits are counted on the very numbers from which it restores keys and values (`stores.Field`).
"""
