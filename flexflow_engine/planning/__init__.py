"""From what a recipe asks for to a policy that fits, before any weights are loaded, and to the seconds that it takes.

asked.py            what a recipe asks for, found and read
chosen_tiers.py     the tiers that it names, and the one that it may lack
availability.py     whether this machine has them, and the room that a plan takes
plan.py             a plan: policy, layout and memory table
predict.py          a whole job's seconds, simulated or from a sample
simulate.py         a run on the virtual clock
clock.py            executors on a virtual clock
cost.py             the cost model: seconds of each task of a graph
arithmetic.py       seconds that one processor computes for
contention.py       what lanes leave of one another's rates
sampling.py         which steps of a long job are simulated
layers.py           steps of a deep model, from a few of its layers
step_costs.py       seconds that a whole step gives each lane, linear in the shares of a placement
attention_costs.py  the part of attention and the KV cache in them
traffic.py          how a step's transfers become seconds of the lanes
outlook.py          what would make a job faster
expectation.py      what a run tells while nothing can be counted yet
hardware.py         hardware profiles as YAML
profile/            measures a machine
"""
