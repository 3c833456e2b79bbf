def plain_table(metrics): return str(metrics["results"])
def render(metrics, evaluation): return "x"
