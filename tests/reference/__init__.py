"""The reference model: the contract of shadows in plain Python, with no database and none of the product's code.

It is written from what the documentation promises, not from how the product does it. All tests that need to know what
is right ask this package: the state machine, the checker of the load tests, the fuzzer, the tests of the twin helpers.
Of iot_models it knows the names of errors, statuses and reports, and nothing else.

| module | what it decides |
|---|---|
| `json_values` | when two JSON values are equal; what a merge patch does (RFC 7396) |
| `documents` | what may be stored, how deep and how large |
| `shadows` | delta, pending, drifted, sync status of one device |
| `versions` | whether a desired write happens; whether a report is accepted, late or of an unknown version |
| `fleet` | what each method of `ShadowService` does to one tenant's devices |
| `methods` | which methods there are, and how each writes |
| `sql` | the rules of `json_values` and `shadows` as SQL functions over jsonb, for PostgreSQL to compute |

A new method of the service: say in `methods` how it writes, and in `fleet` what it does. A new rule: one function in
the module of its subject; `sql` too where PostgreSQL can compute it.
"""
