"""One compiled round: plan, client loop, aggregation, program, evaluation."""
