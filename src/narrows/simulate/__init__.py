"""What happens over many steps: closed forms and simulations on top of the cost of one step."""
